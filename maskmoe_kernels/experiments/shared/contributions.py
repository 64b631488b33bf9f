"""Figures of Shapley values: one prediction, a data set, and which groups act together.

All are in log-odds: the contributions of a prediction add up to its log-odds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.experiments.shared.plot_style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    VERMILLION,
    canvas,
    light_grid,
    save,
    wrap,
)

#: Probabilities that the upper axis of log-odds names.
_PROBABILITIES = (0.001, 0.01, 0.03, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97, 0.99, 0.999)
#: Most samples that are drawn as points; more would hide each other.
_POINTS = 1500
#: Characters in a line of a bar's label.
_LABEL = 30


def waterfall(
    contributions: Mapping[str, float],
    path: str | Path,
    *,
    title: str,
    base: tuple[str, float] | None = None,
    answers: Mapping[str, float] | None = None,
    sufficient: str | None = None,
    tolerance: float | None = None,
) -> None:
    """One prediction: how its contributions add up to it, and which experts say the same.

    Args:
        contributions: What each group adds, in log-odds, in the order of the bars.
        path: Where to write the PNG.
        title: What is predicted.
        base: Where the bars begin, in words and in log-odds; ``None``: at 0, and no word of it.
        answers: Log-odds of each expert, the one that sees all last; drawn below the bars.
        sufficient: The smallest expert that suffices, one of ``answers``.
        tolerance: In log-odds: experts this near to the one that sees all suffice.

    Raises:
        LayoutError: No contribution, or ``sufficient`` is no expert.
        BackendError: matplotlib is missing.
    """
    if not contributions:
        raise LayoutError("contributions is empty; a waterfall needs the value of a group at least")
    if sufficient is not None and sufficient not in (answers or {}):
        raise LayoutError(
            f"sufficient must be an expert of answers, {list(answers or {})}: {sufficient!r}"
        )
    bars = len(contributions) + (base is not None) + 1
    rows = [bars + 0.3, len(answers) + 0.3] if answers else [bars]
    figure = canvas(8.6, 1.9 + 0.46 * sum(rows) + 0.35 * len(rows))
    panels = figure.subplots(len(rows), 1, sharex=True, height_ratios=rows, squeeze=False)[:, 0]
    reached = _bars(panels[0], contributions, base)
    shown = [*reached, *(answers or {}).values()]
    margin = 0.2 * max(max(shown) - min(shown), 0.5)
    panels[0].set_xlim(min(shown) - margin, max(shown) + margin)
    if answers:
        _answers(panels[1], answers, sufficient, tolerance)
        figure.legend(loc="outside lower center", frameon=False, fontsize=10)
    _probability_axis(panels[0])
    panels[-1].set_xlabel("log-odds")
    figure.suptitle("\n".join(wrap(line, 88) for line in title.splitlines()), fontsize=12)
    save(figure, path)


def _bars(
    ax: Any, contributions: Mapping[str, float], base: tuple[str, float] | None
) -> list[float]:
    """The bars from the base to the prediction, top to bottom; the values they reach."""
    at = 0.0 if base is None else base[1]
    reached, labels = [at], []
    joint = {"color": GREY, "lw": 1, "zorder": 0}
    if base is not None:
        ax.plot(at, 0, marker="o", ms=8, color=GREY, ls="")
        ax.annotate(f"{at:+z.2f}", (at, 0), (9, 0), textcoords="offset points", va="center")
        labels.append(wrap(base[0], _LABEL))
    for name, value in contributions.items():
        row = len(labels)
        if row:
            ax.plot([at, at], [row - (0.69 if row > 1 or base is None else 1), row - 0.31], **joint)
        ax.barh(row, value, 0.62, left=at, color=VERMILLION if value > 0 else BLUE)
        at += value
        side = 1 if value > 0 else -1
        ax.annotate(
            f"{value:+z.2f}", (at, row), (5 * side, 0), textcoords="offset points", va="center",
            ha="left" if side > 0 else "right",
        )  # fmt: skip
        reached.append(at)
        labels.append(wrap(name, _LABEL))
    row = len(labels)
    ax.plot([at, at], [row - 0.69, row], **joint)
    ax.plot(at, row, marker="D", ms=9, color=BLACK, ls="")
    text = f"{at:+z.2f}: probability {1 / (1 + math.exp(-at)):.2f}"
    right = at < (min(reached) + max(reached)) / 2 or at == min(reached)
    ax.annotate(
        text, (at, row), (9 if right else -9, 0), textcoords="offset points", va="center",
        ha="left" if right else "right", weight="bold",
    )  # fmt: skip
    ax.set_yticks(range(row + 1), [*labels, "prediction"])
    ax.set_ylim(row + 0.6, -0.6)
    light_grid(ax, "x")
    return reached


def _answers(
    ax: Any, answers: Mapping[str, float], sufficient: str | None, tolerance: float | None
) -> None:
    """The answer of each expert, and the band within which one suffices."""
    top = list(answers.values())[-1]
    if tolerance is not None:
        label = f"within {tolerance:g} of the prediction: who answers here suffices"
        ax.axvspan(top - tolerance, top + tolerance, color=GREEN, alpha=0.16, lw=0, label=label)
    ax.axvline(top, color=BLACK, lw=1, zorder=0)
    for row, (name, value) in enumerate(answers.items()):
        chosen = name == sufficient
        style = {"color": GREEN, "ms": 11} if chosen else {"color": GREY, "ms": 8}
        ax.plot(value, row, marker="o", ls="", mec=BLACK, mew=1.2 if chosen else 0.6, **style)
        if chosen:
            on_left = value > sum(ax.get_xlim()) / 2
            ax.annotate(
                "suffices", (value, row), (-10 if on_left else 10, 0), textcoords="offset points",
                va="center", ha="right" if on_left else "left", weight="bold",
                bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1.5},
            )  # fmt: skip
    ax.set_yticks(range(len(answers)), [f"expert {wrap(name, _LABEL)}" for name in answers])
    ax.set_ylim(len(answers) - 0.4, -0.6)
    light_grid(ax, "x")


def _probability_axis(ax: Any) -> None:
    """Name probabilities along the top, where they are far enough apart to be read."""
    low, high = ax.get_xlim()
    shown: list[tuple[float, float]] = []
    for p in sorted(_PROBABILITIES, key=lambda p: abs(p - 0.5)):
        at = math.log(p / (1 - p))
        if low <= at <= high and all(abs(at - x) > 0.09 * (high - low) for x, _ in shown):
            shown.append((at, p))
    top = ax.secondary_xaxis("top")
    top.set_xticks([x for x, _ in shown], [f"{p:g}" for _, p in shown])
    top.set_xlabel("probability")


def over_data(
    names: Sequence[str],
    phi: Tensor,
    path: str | Path,
    *,
    title: str,
    colour: Tensor | None = None,
    colour_name: str = "",
) -> None:
    """A data set: each sample's contributions as points, and their mean size as bars.

    Args:
        names: Of the groups.
        phi: Contributions in log-odds, ``(n, G)``; the bars are of all, the points of some.
        path: Where to write the PNG.
        title: What is predicted, and of which samples.
        colour: What colours the points, ``(n,)``, or of each group ``(n, G)``.
        colour_name: Of it.

    Raises:
        LayoutError: A shape that does not fit, or no sample.
        BackendError: matplotlib is missing.
    """
    if phi.dim() != 2 or phi.shape[1] != len(names) or not len(phi):
        raise LayoutError(f"phi must be (n, {len(names)}), n at least 1, got {tuple(phi.shape)}")
    if colour is not None and colour.shape not in (phi.shape, phi.shape[:1]):
        raise LayoutError(f"colour must be (n,) or (n, G), got {tuple(colour.shape)}")
    size = phi.abs().double().mean(0)
    order = size.argsort(descending=True).tolist()
    some = torch.linspace(0, len(phi) - 1, min(_POINTS, len(phi))).round().long()
    figure = canvas(11.0, 2.0 + 0.75 * len(names))
    left, right = figure.subplots(1, 2, width_ratios=[2.1, 1], sharey=True)
    for row, group in enumerate(order):
        of_group = colour if colour is None or colour.dim() == 1 else colour[:, group]
        points = _swarm(left, row, phi[some, group].double(), of_group, some)
    if colour is not None:
        bar = figure.colorbar(points, ax=left, fraction=0.03, pad=0.02)
        bar.set_label(colour_name)
        if colour.dim() == 2:  # each group has a scale of its own
            bar.set_ticks([bar.vmin, bar.vmax], labels=["low", "high"])
    left.axvline(0, color=GREY, lw=1, zorder=0)
    left.set_yticks(range(len(order)), [wrap(names[g], 22) for g in order])
    left.set_ylim(len(order) - 0.5, -0.5)
    left.set_xlabel("contribution of one sample (log-odds)")
    bars = right.barh(range(len(order)), size[order].numpy(), 0.6, color=VERMILLION)
    right.bar_label(bars, fmt="%.2f", padding=4, fontsize=10)
    right.set_xlim(0, 1.18 * max(float(size.max()), 1e-6))
    right.set_xlabel(f"mean size over {len(phi):,} samples (log-odds)")
    right.tick_params(axis="y", left=False)
    for ax in (left, right):
        light_grid(ax, "x")
    figure.suptitle(title, fontsize=12)
    save(figure, path)


def _swarm(ax: Any, row: int, values: Tensor, colour: Tensor | None, some: Tensor) -> Any:
    """The points of one group; ``colour`` of all samples, of which ``some`` are drawn."""
    style: dict[str, Any] = {"s": 9, "lw": 0, "alpha": 0.75, "rasterized": True}
    if colour is None:
        style["color"] = BLUE
    else:  # without its extremes, which would leave the others one colour
        ends = torch.tensor([0.02, 0.98], dtype=torch.float64, device="cpu")
        low, high = colour.double().quantile(ends).tolist()
        style |= {"cmap": "cividis", "vmin": low, "vmax": high, "c": colour[some].numpy()}
    return ax.scatter(values.numpy(), (row + 0.36 * _spread(values)).numpy(), **style)


def _spread(values: Tensor) -> Tensor:
    """Heights in -1..1 that keep points of near values apart, by how many there are."""
    low, high = values.min(), values.max()
    bins = 60
    place = ((values - low) / (high - low).clamp(min=1e-12) * (bins - 1)).round().long()
    count = torch.bincount(place, minlength=bins)
    seen = torch.zeros(bins, dtype=torch.int64)
    height = torch.zeros_like(values)
    for k, at in enumerate(place.tolist()):
        rank = int(seen[at])
        seen[at] += 1
        height[k] = (1 if rank % 2 else -1) * ((rank + 1) // 2)
    return height / max(float(count.max()) / 2, 6.0)


def interaction_matrix(names: Sequence[str], size: Tensor, path: str | Path, *, title: str) -> None:
    """Which groups act together: the size of each pair's interaction, main effects on the diagonal.

    Args:
        names: Of the groups.
        size: Mean size of the interactions over samples, ``(G, G)``, log-odds. An entry off the
            diagonal is half of a pair's interaction, as :func:`maskmoe_kernels.interactions` has
            it, so that a row's entries are what a group's Shapley value is made of.
        path: Where to write the PNG.
        title: What is predicted.

    Raises:
        LayoutError: A shape that does not fit.
        BackendError: matplotlib is missing.
    """
    if size.shape != (len(names), len(names)):
        raise LayoutError(f"size must be ({len(names)}, {len(names)}), got {tuple(size.shape)}")
    cell = 0.95 if len(names) < 8 else 0.7
    figure = canvas(3.4 + cell * len(names), 2.3 + cell * len(names))
    ax = figure.subplots()
    top = max(float(size.max()), 1e-6)
    image = ax.imshow(size.double().numpy(), cmap="cividis", vmin=0, vmax=top)
    for i, row in enumerate(size.tolist()):
        for j, value in enumerate(row):
            color = "white" if value < 0.55 * top else "black"
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, fontsize=10)
    labels = [wrap(name, 14) for name in names]
    ax.set_xticks(range(len(names)), labels, rotation=30 if len(names) > 4 else 0)
    ax.set_yticks(range(len(names)), labels)
    ax.spines[:].set_visible(False)
    figure.colorbar(image, ax=ax, fraction=0.046, pad=0.03).set_label("mean size (log-odds)")
    figure.suptitle(title, fontsize=12)
    save(figure, path)
