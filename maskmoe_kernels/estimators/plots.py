"""Pictures of explanations with matplotlib, which is imported where it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from maskmoe_kernels.estimators.tables import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_UP, _DOWN, _QUIET = "#c0392b", "#2471a3", "#7f8c8d"
_LONGEST = 34


def axes(width: float, height: float) -> Axes:
    """Axes of a new figure of these inches, which no window owns.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "plots need matplotlib: pip install 'maskmoe_kernels[sklearn]'"
        ) from None
    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def short(text: str) -> str:
    """``text``, cut off where it would fill the picture; ``$`` is no formula."""
    cut = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    return cut.replace("$", r"\$")


def waterfall(
    names: Sequence[str],
    values: Array,
    base: float,
    unit: str,
    title: str,
    ax: Axes | None,
    most: int,
) -> Axes:
    """Bars from the base to the answer, the largest contribution at the top.

    Args:
        names: Of the contributions.
        values: ``(groups,)``.
        base: Where the bars begin.
        unit: Of the axis.
        title: Of the picture.
        ax: Where to draw; ``None``: a new figure.
        most: Bars at the most; the smallest contributions share the last one.
    """
    order = np.argsort(-np.abs(values), kind="stable")
    shown = [*order[: most if len(order) <= most else most - 1]]
    labels = [short(names[k]) for k in shown]
    steps = [float(values[k]) for k in shown]
    if len(order) > len(shown):
        rest = order[len(shown) :]
        labels.append(f"{len(rest)} others")
        steps.append(float(values[rest].sum()))
    ax = axes(7.5, 1.4 + 0.36 * len(steps)) if ax is None else ax
    at = np.arange(len(steps))[::-1]
    # From the bottom, where the base is, up to the answer at the top.
    ends = base + np.cumsum(steps[::-1])[::-1]
    starts = ends - steps
    colours = [_UP if step > 0 else _DOWN for step in steps]
    ax.barh(at, steps, left=starts, color=colours, height=0.7)
    low, high = min(base, *ends, *starts), max(base, *ends, *starts)
    room = 0.16 * (high - low or 1.0)
    for y, step, start, end in zip(at, steps, starts, ends, strict=True):
        left = step < 0
        x = min(start, end) if left else max(start, end)
        ax.text(
            x, y, f" {step:+.2g} ", va="center", ha="right" if left else "left", fontsize=8
        )  # fmt: skip
    ax.set_xlim(low - room, high + room)
    ax.axvline(base, color=_QUIET, linewidth=1, linestyle=":")
    ax.axvline(ends[0], color="black", linewidth=1)
    ax.set_yticks(at, labels)
    ax.set_xlabel(f"{unit}: from {base:.3g} (dotted) to {ends[0]:.3g}")
    ax.set_title(title.replace("$", r"\$"), fontsize=9, loc="left", wrap=True)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def bars(names: Sequence[str], values: Array, label: str, ax: Axes | None = None) -> Axes:
    """Horizontal bars, the first name at the top."""
    ax = axes(7.5, 1 + 0.3 * len(names)) if ax is None else ax
    at = np.arange(len(names))[::-1]
    ax.barh(at, values, color=_DOWN, height=0.7)
    ax.set_yticks(at, [short(name) for name in names])
    ax.set_xlabel(label)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def curve(x: Array, y: Array, spread: Array, title: str, unit: str, missing: Any) -> Axes:
    """A shape function of numbers with the distribution of the training rows below it.

    Args:
        x: Ascending, ``(points,)``.
        y: ``(points,)`` or ``(points, classes)``.
        spread: Share of the rows in bins of equal width from the first x to the last.
        title: Name of the column.
        unit: Of y.
        missing: y where the column is missing, or ``None`` if it never was.
    """
    ax = axes(5, 3.2)
    ax.plot(x, y, linewidth=1.6)
    if missing is not None:
        for level in np.atleast_1d(missing):
            ax.axhline(level, color=_QUIET, linewidth=1, linestyle=":")
        ax.text(1, 1.01, "dotted: missing", transform=ax.transAxes, ha="right", fontsize=7)
    below = ax.inset_axes((0, 0, 1, 0.16))
    if len(x) > 1 and x[-1] > x[0]:
        edges = np.linspace(x[0], x[-1], len(spread) + 1)
        below.bar(edges[:-1], spread, np.diff(edges), align="edge", color=_QUIET, alpha=0.4)
        below.set_xlim(ax.get_xlim())
    below.axis("off")
    return _titled(ax, title, unit)


def levels(
    names: Sequence[str], y: Array, base: Any, title: str, unit: str, classes: Sequence[str]
) -> Axes:
    """A shape function of categories: bars from the base, or a point for each class.

    Args:
        names: Of the categories.
        y: ``(categories,)`` or ``(categories, classes)``.
        base: Where the bars begin.
        title: Name of the column.
        unit: Of y.
        classes: Their labels.
    """
    ax = axes(5, 3.2)
    at = np.arange(len(names))
    if y.ndim == 1:
        colours = [_UP if value > base else _DOWN for value in y]
        ax.bar(at, y - base, bottom=base, color=colours, width=0.7)
        ax.axhline(base, color=_QUIET, linewidth=1, linestyle=":")
    else:
        ax.plot(at, y, marker="o", linestyle="none", label=[*classes])
    ax.set_xticks(at, [short(name) for name in names], rotation=60, ha="right", fontsize=7)
    return _titled(ax, title, unit)


def heat_map(x: Sequence[str], y: Sequence[str], z: Array, title: str, unit: str) -> Axes:
    """Values ``(len(y), len(x))`` of a pair in colours, 0 in the middle."""
    ax = axes(5, 4)
    largest = float(np.abs(z).max()) or 1.0
    image = ax.imshow(z, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-largest, vmax=largest)
    for axis, labels in (("x", x), ("y", y)):
        step = max(1, len(labels) // 8)
        at = [*range(0, len(labels), step)]
        turned: dict[str, Any] = {"rotation": 60, "ha": "right"} if axis == "x" else {}
        getattr(ax, f"set_{axis}ticks")(at, [short(labels[k]) for k in at], fontsize=7, **turned)
    bar = ax.figure.colorbar(image, ax=ax)
    bar.set_label(unit, fontsize=8)
    ax.set_title(short(title), fontsize=9, loc="left")
    return ax


def _titled(ax: Axes, title: str, unit: str) -> Axes:
    ax.set_title(short(title), fontsize=9, loc="left")
    ax.set_ylabel(unit, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    return ax
