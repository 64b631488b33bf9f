"""Charts of any experiment: who decides, and learning curves. Each writes a PNG atomically."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    losses: Mapping[str, str] | None = None,
) -> None:
    """Training loss and validation metrics per epoch; the kept epoch of each model is marked.

    Args:
        curves: Model name to its history: column name to one value per epoch, or one record
            per epoch. Columns that end in ``loss``, have an ``@``, or are named ``accuracy``,
            ``acc``, ``maa`` or ``metric`` are drawn, each in a panel of its own; others are not.
        path: Where to write the PNG.
        monitor: Column whose largest value names the kept epoch; the first metric where a
            model has no such column.
        title: First line of the figure.
        losses: Model name to the name of its training loss. Losses of different names are
            different quantities and have panels of their own.

    Raises:
        LayoutError: No model, or no epoch at all.
        BackendError: matplotlib is missing.
    """
    tables = {name: _columns(history) for name, history in curves.items()}
    panels = _panels(tables, losses or {})
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = canvas(1.2 + 4.4 * columns, 1.2 + 3.4 * rows + 0.2 * len(tables))
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, panel in zip(places, panels, strict=False):
        _curves_panel(ax, tables, panel, monitor)
    for ax in places[len(panels) :]:
        ax.set_visible(False)
    handles, labels = [], []
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    if any(_kept_epoch(table, monitor) is not None for table in tables.values()):
        star = {"marker": "*", "ms": 14, "mfc": "white", "mec": BLACK, "ls": ""}
        handles.append(module("lines").Line2D([], [], label="kept epoch", **star))
        title += "\nThe starred epoch is the one whose weights are kept"
    figure.suptitle(title, fontsize=13)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    save(figure, path)


@dataclass(frozen=True)
class _Panel:
    """One quantity over the epochs.

    Attributes:
        key: Its column.
        name: Of the quantity.
        unit: Of its axis.
        lower: Whether lower is better.
        models: Those to draw.
    """

    key: str
    name: str
    unit: str
    lower: bool
    models: Sequence[str]


def _panels(
    tables: Mapping[str, Mapping[str, Sequence[float]]], losses: Mapping[str, str]
) -> list[_Panel]:
    """A panel for each quantity that the histories hold."""
    keys = list(dict.fromkeys(key for table in tables.values() for key in table))
    metrics = [key for key in keys if "@" in key or key.lower() in _METRICS]
    trained = [key for key in keys if key.endswith("loss")]
    if not trained + metrics:
        raise LayoutError(f"nothing to draw: no loss or metric among the columns {keys}")
    panels = [
        _Panel(key, f"{name or 'loss'}, training", "nats", True, models)
        for key in trained
        for name, models in _models_by_loss(list(tables), losses).items()
    ]
    return panels + [
        _Panel(metric, f"{metric}, validation", "0 to 1", False, list(tables)) for metric in metrics
    ]


def _models_by_loss(models: Sequence[str], losses: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for model in models:
        found.setdefault(losses.get(model, ""), []).append(model)
    return found


def _columns(history: History) -> dict[str, list[float]]:
    if isinstance(history, Mapping):
        return {name: list(values) for name, values in history.items()}
    names = dict.fromkeys(name for record in history for name in record)
    return {name: [record[name] for record in history] for name in names}


def _curves_panel(
    ax: Any, tables: Mapping[str, Mapping[str, Sequence[float]]], panel: _Panel, monitor: str
) -> None:
    epochs = 1
    for m, (name, table) in enumerate(tables.items()):
        values = table.get(panel.key)
        if name not in panel.models or not values:
            continue
        epochs = max(epochs, len(values))
        color, marker = CURVES[m % len(CURVES)], MARKERS[m % len(MARKERS)]
        style = {"color": color, "marker": marker, "ms": 4}
        ax.plot(range(1, len(values) + 1), values, label=name, **style)
        kept = _kept_epoch(table, monitor)
        if kept is not None and kept < len(values):
            star = {"marker": "*", "ms": 15, "mfc": color, "mec": BLACK, "zorder": 4}
            ax.plot(kept + 1, values[kept], **star)
    ax.set_title(f"{panel.name}: {'lower' if panel.lower else 'higher'} is better", fontsize=11)
    ax.set_ylabel(f"{panel.unit}; axis cut" if ax.get_ylim()[0] > 0 else panel.unit)
    ax.set_xlabel("epoch")
    margin = 0.5 if epochs == 1 else 0.04 * epochs
    ax.set_xlim(1 - margin, epochs + margin)
    ax.xaxis.set_major_locator(module("ticker").MaxNLocator(integer=True, min_n_ticks=1))
    light_grid(ax, "both")


def _kept_epoch(table: Mapping[str, Sequence[float]], monitor: str) -> int | None:
    key = monitor if monitor in table else next((key for key in table if "@" in key), None)
    if key is None or not table[key]:
        return None
    return max(range(len(table[key])), key=table[key].__getitem__)
