"""Charts of any experiment: who decides, and learning curves. Each writes a PNG atomically."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.experiments.shared.plot_style import (
    BLACK,
    BLUE,
    CURVES,
    GREY,
    MARKERS,
    ORANGE,
    canvas,
    light_grid,
    module,
    save,
    wrap,
)


def attribution_bars(
    names: Sequence[str],
    mean_attribution: Sequence[float],
    most_attributed_share: Sequence[float],
    path: str | Path,
    paper: Sequence[float] | None = None,
    title: str = "Which features decide?",
) -> None:
    """Figure 6 (and 8): share of samples each expert decides, and its mean attribution.

    Args:
        names: Of the experts.
        mean_attribution: Mean over samples, one per expert, in [0, 1].
        most_attributed_share: Share of samples whose largest attribution is the expert's.
        path: Where to write the PNG.
        paper: The paper's most-attributed shares, drawn beside ours.
        title: First line of the figure.

    Raises:
        LayoutError: Lengths that differ.
        BackendError: matplotlib is missing.
    """
    series = {"mean_attribution": mean_attribution, "most_attributed_share": most_attributed_share}
    for argument, values in {**series, "paper": paper or names}.items():
        if len(values) != len(names):
            raise LayoutError(f"{argument} must hold {len(names)} values, got {len(values)}")
    figure = canvas(8.0, 2.1 + (0.62 if paper is None else 0.85) * len(names))
    ax = figure.subplots()
    at = torch.arange(len(names)).float()
    shown = [
        (most_attributed_share, BLUE, "samples this expert decides (largest attribution)"),
        (mean_attribution, ORANGE, "mean attribution over all samples"),
    ]
    if paper is not None:
        shown.insert(1, (paper, GREY, "samples it decides in the paper"))
    step = 0.78 / len(shown)
    for k, (values, color, label) in enumerate(shown):
        places = (at + (k - (len(shown) - 1) / 2) * step).numpy()
        percent = [100 * value for value in values]
        bars = ax.barh(places, percent, 0.92 * step, color=color, label=label)
        ax.bar_label(bars, fmt="%.1f %%", padding=4, fontsize=9)
    ax.set_yticks(at.numpy(), [wrap(name, 22) for name in names], fontsize=10)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.16 * 100 * max([*mean_attribution, *most_attributed_share, *(paper or [])]))
    ax.set_xlabel("share (%)")
    ax.set_ylabel("expert")
    light_grid(ax, "x")
    figure.suptitle(f"{title}\nHow much of the answers rests on each expert", fontsize=13)
    figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=10)
    save(figure, path)


History = Mapping[str, Sequence[float]] | Sequence[Mapping[str, float]]


_METRICS = ("accuracy", "acc", "maa", "metric")


def learning_curves(
    curves: Mapping[str, History],
    path: str | Path,
    monitor: str = "NDCG@10",
    title: str = "Learning curves",
) -> None:
    """Training loss and validation metrics per epoch; the kept epoch of each model is marked.

    Args:
        curves: Model name to its history: column name to one value per epoch, or one record
            per epoch. Columns that end in ``loss`` go into the first panel, those with an ``@``
            or named ``accuracy``, ``acc``, ``maa`` or ``metric`` into panels of their own; others
            are not drawn.
        path: Where to write the PNG.
        monitor: Column whose largest value names the kept epoch; the first metric where a
            model has no such column.
        title: First line of the figure.

    Raises:
        LayoutError: No model, or no epoch at all.
        BackendError: matplotlib is missing.
    """
    tables = {name: _columns(history) for name, history in curves.items()}
    columns = list(dict.fromkeys(key for table in tables.values() for key in table))
    metrics = [key for key in columns if "@" in key or key.lower() in _METRICS]
    losses = [key for key in columns if key.endswith("loss")]
    if not losses + metrics:
        raise LayoutError(f"nothing to draw: no loss or metric among the columns {columns}")
    panels = [losses] * bool(losses) + [[metric] for metric in metrics]
    figure = canvas(1.2 + 4.4 * len(panels), 4.6 + 0.2 * len(tables))
    for ax, keys in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _curves_panel(ax, tables, keys, monitor)
    handles, labels = [], []
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    star = {"marker": "*", "ms": 14, "mfc": "white", "mec": BLACK, "ls": ""}
    handles.append(module("lines").Line2D([], [], label="kept epoch", **star))
    figure.suptitle(f"{title}\nThe starred epoch is the one whose weights are kept", fontsize=13)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    save(figure, path)


def _columns(history: History) -> dict[str, list[float]]:
    if isinstance(history, Mapping):
        return {name: list(values) for name, values in history.items()}
    names = dict.fromkeys(name for record in history for name in record)
    return {name: [record[name] for record in history] for name in names}


def _curves_panel(
    ax: Any, tables: Mapping[str, Mapping[str, Sequence[float]]], keys: Sequence[str], monitor: str
) -> None:
    for m, (name, table) in enumerate(tables.items()):
        color, marker = CURVES[m % len(CURVES)], MARKERS[m % len(MARKERS)]
        for k, key in enumerate(key for key in keys if key in table):
            values = table[key]
            label = name if len(keys) == 1 else f"{name}, {key.replace('_', ' ')}"
            style = {"color": color, "marker": marker, "ms": 4, "ls": ("-", "--", ":")[k % 3]}
            epochs = range(1, len(values) + 1)
            ax.plot(epochs, values, label=label if len(keys) > 1 else name, **style)
            kept = _kept_epoch(table, monitor)
            if kept is not None and kept < len(values):
                star = {"marker": "*", "ms": 15, "mfc": color, "mec": BLACK, "zorder": 4}
                ax.plot(kept + 1, values[kept], **star)
    loss = keys[0].endswith("loss")
    name = "loss" if len(keys) > 1 else keys[0].replace("_", " ")
    ax.set_title(f"{name}: {'lower' if loss else 'higher'} is better", fontsize=11)
    ax.set_ylabel("loss (nats)" if loss else f"{name}, validation (0 to 1)")
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(module("ticker").MaxNLocator(integer=True))
    light_grid(ax, "both")


def _kept_epoch(table: Mapping[str, Sequence[float]], monitor: str) -> int | None:
    key = monitor if monitor in table else next((key for key in table if "@" in key), None)
    if key is None or not table[key]:
        return None
    return max(range(len(table[key])), key=table[key].__getitem__)
