"""Pictures of explanations with matplotlib, which is imported where it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from maskmoe_kernels.estimators.tables import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_UP, _DOWN, _QUIET = "#c0392b", "#2471a3", "#7f8c8d"
#: Characters of a label; of one in a small picture.
_LONGEST, _SHORT = 34, 22
#: Inches and points of a small picture and its text: 9 pixels or more in a column of a report.
_WIDTH, _SIZE = 4.4, 8.5
#: Of the first classes; of all others.
_COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")
_OTHERS = "#c3c9cc"
#: Up to so many values, a picture names each of them.
_FEW = 12
#: So many groups are named; of more, those that are left out, if they are fewer.
LISTED = 4
#: From this share of rows in the bin about 0 on, an axis of numbers is logarithmic.
_LONG_TAIL = 0.5


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


def short(text: str, longest: int = _LONGEST) -> str:
    """``text``, cut off where it would fill the picture; ``$`` is no formula."""
    return _cut(text, longest).replace("$", r"\$")


def shorter(groups: Sequence[str], among: Sequence[str]) -> tuple[str, list[str]]:
    """How to name ``groups``: ``""`` and they; or ``"all but "`` and the others ``among`` which.

    The others stand for more than :data:`LISTED` groups, if they are fewer; they may be none.
    """
    others = [name for name in among if name not in groups]
    if len(groups) <= LISTED or len(others) >= len(groups):
        return "", [*groups]
    return "all but ", others


def fact(name: str, value: str) -> str:
    """``name = value`` as a label, in which neither pushes out the other."""
    held = _cut(value, _LONGEST // 2)
    return f"{_cut(name, _LONGEST - len(held) - 3)} = {held}"


def number(value: float, sign: str = "", digits: int = 3) -> str:
    """Three digits, or thousands apart: 0.0123, 12.3, 12,345; with ``sign="+"``, +12.3."""
    large = 1000 <= abs(value) < 1e9
    return format(value, f"{sign},.0f" if large else f"{sign}.{digits}g")


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


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
    room = 0.2 * (high - low or 1.0)
    for y, step, start, end in zip(at, steps, starts, ends, strict=True):
        left = step < 0
        x = min(start, end) if left else max(start, end)
        side, over = "right" if left else "left", {"facecolor": "white", "lw": 0, "pad": 0}
        told = f" {number(step, '+')} "
        ax.text(x, y, told, va="center", ha=side, fontsize=_SIZE, bbox=over, zorder=0.9)
    ax.set_xlim(low - room, high + room)
    ax.axvline(base, color=_QUIET, linewidth=1, linestyle=":")
    ax.axvline(ends[0], color="black", linewidth=1)
    ax.set_yticks(at, labels)
    ax.locator_params(axis="x", nbins=6)
    ax.set_xlabel(f"{short(unit)}: from {number(base)} (dotted) to {number(ends[0])}")
    ax.set_title(title.replace("$", r"\$"), fontsize=9, loc="left", wrap=True)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def bars(names: Sequence[str], values: Array, label: str) -> Axes:
    """Horizontal bars, the first name at the top."""
    ax = axes(5.2, 0.9 + 0.26 * len(names))
    at = np.arange(len(names))[::-1]
    ax.barh(at, values, color=_DOWN, height=0.7)
    ax.set_yticks(at, [short(name) for name in names])
    ax.locator_params(axis="x", nbins=5)
    ax.set_xlabel(short(label, 60))
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def curve(
    x: Array,
    y: Array,
    spread: Array,
    title: str,
    unit: str,
    missing: Any,
    classes: Sequence[str],
) -> Axes:
    """A shape function of numbers with the distribution of the training rows below it.

    Args:
        x: Ascending, ``(points,)``.
        y: ``(points,)`` or ``(points, classes)``.
        spread: Share of the rows in bins of equal width from the first x to the last.
        title: Name of the column.
        unit: Of y.
        missing: y where the column is missing, or ``None`` if it never was.
        classes: Their labels.
    """
    ax = axes(_WIDTH, 3)
    few = len(x) <= _FEW
    style = {"marker": "o", "markersize": 4, "linewidth": 0.8} if few else {"linewidth": 1.6}
    lines = _lines(ax, x, y, classes, style)
    if missing is not None:
        for line, level in zip(lines, np.atleast_1d(missing), strict=True):
            ax.axhline(level, color=line.get_color(), linewidth=1, linestyle=":")
        ax.text(1, 1.02, "dotted: missing", ha="right", fontsize=_SIZE, transform=ax.transAxes)
    below = ax.inset_axes((0, 0, 1, 0.16))
    if len(x) > 1 and x[-1] > x[0]:
        edges = np.linspace(x[0], x[-1], len(spread) + 1)
        below.bar(edges[:-1], spread, np.diff(edges), align="edge", color=_QUIET, alpha=0.4)
        if not few and _has_long_tail(x, spread, edges):
            size = np.abs(x[x != 0])
            linear = {"linthresh": max(size.min(), 1e-6 * size.max())}
            for each in (ax, below):
                each.set_xscale("log") if x[0] > 0 else each.set_xscale("symlog", **linear)
            ax.minorticks_off()
    if few:
        ax.set_xticks(x, [number(value) for value in x])
    below.set_xlim(ax.get_xlim())
    below.axis("off")
    return _titled(ax, title, unit)


def _has_long_tail(x: Array, spread: Array, edges: Array) -> bool:
    """Whether most rows stand in one bin, where numbers are smallest: a wall beside a desert."""
    most = int(spread.argmax())
    smallest = x[np.abs(x).argmin()]
    return bool(spread[most] > _LONG_TAIL and edges[most] <= smallest <= edges[most + 1])


def levels(
    names: Sequence[str],
    y: Array,
    spread: Array,
    base: Any,
    title: str,
    unit: str,
    classes: Sequence[str],
) -> Axes:
    """A shape function of categories: bars from the base, or a point for each class.

    Args:
        names: Of the categories, the first at the top.
        y: ``(categories,)`` or ``(categories, classes)``.
        spread: Share of the training rows in each category.
        base: Where the bars begin.
        title: Name of the column.
        unit: Of y.
        classes: Their labels.
    """
    ax = axes(_WIDTH, 1.2 + 0.2 * max(4, len(names)))
    at = np.arange(len(names))[::-1]
    if y.ndim == 1:
        colours = [_UP if value > base else _DOWN for value in y]
        ax.barh(at, y - base, left=base, color=colours, height=0.7)
        ax.axvline(base, color=_QUIET, linewidth=1, linestyle=":")
    else:
        _lines(ax, y, at, classes, {"marker": "o", "markersize": 5, "linestyle": "none"})
    shown = [f"{short(n, _SHORT)} ({share:.0%})" for n, share in zip(names, spread, strict=True)]
    rest = 1 - float(spread.sum())
    if rest > 0.0005:
        ax.text(base if y.ndim == 1 else 0, -1, " not shown", va="center", fontsize=_SIZE)
        at, shown = np.append(at, -1), [*shown, f"others ({rest:.0%})"]
    ax.set_yticks(at, shown)
    return _titled(ax, title, unit, "x")


def _lines(
    ax: Axes, x: Array, y: Array, classes: Sequence[str], style: dict[str, Any]
) -> list[Any]:
    """A line for each column of x or y; of many, those that vary most have colours and names."""
    wide = x if x.ndim == 2 else y
    if wide.ndim == 1:
        return ax.plot(x, y, **style)
    widest = np.argsort(-np.ptp(wide, axis=0), kind="stable")[: len(_COLOURS)]
    colours = dict(zip(sorted(widest.tolist()), _COLOURS, strict=False))
    lines = []
    for k in range(wide.shape[1]):
        order = 2 if k in colours else 1
        pair = (x[:, k], y) if wide is x else (x, y[:, k])
        lines += ax.plot(*pair, color=colours.get(k, _OTHERS), zorder=order, **style)
    named = [*colours]
    labels = [short(classes[k], _SHORT) for k in named]
    if len(lines) > len(named):
        named.append(next(k for k in range(len(lines)) if k not in colours))
        labels.append(f"{len(lines) - len(colours)} others")
    columns = max(1, min(len(labels), 50 // (max(map(len, labels)) + 7)))
    place = {"loc": "outside lower center", "ncols": columns, "fontsize": _SIZE, "frameon": False}
    figure: Any = ax.figure
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(labels) // columns))
    figure.legend([lines[k] for k in named], labels, handlelength=1, columnspacing=1, **place)
    return lines


def heat_map(
    x: Sequence[str], y: Sequence[str], z: Array, names: tuple[str, str], unit: str
) -> Axes:
    """Values ``(len(y), len(x))`` of a pair in colours, 0 in the middle."""
    ax = axes(_WIDTH, 3.6)
    largest = float(np.abs(z).max()) or 1.0
    image = ax.imshow(z, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-largest, vmax=largest)
    for axis, labels, name in (("x", x, names[0]), ("y", y, names[1])):
        step = -(-len(labels) // (6 if axis == "x" else _FEW))
        at = [*range(0, len(labels), step)]
        turned: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        shown = [short(labels[k], 16) for k in at]
        getattr(ax, f"set_{axis}ticks")(at, shown, **(turned if axis == "x" else {}))
        getattr(ax, f"set_{axis}label")(short(name), fontsize=_SIZE)
    bar = ax.figure.colorbar(image, ax=ax)
    bar.set_label(short(unit), fontsize=_SIZE)
    bar.ax.tick_params(labelsize=_SIZE)
    ax.tick_params(labelsize=_SIZE)
    return ax


def _titled(ax: Axes, title: str, unit: str, axis: str = "y") -> Axes:
    """A small picture with the name of a column over it, and the unit beside ``axis``."""
    ax.set_title(short(title), fontsize=9.5, loc="left")
    getattr(ax, f"set_{axis}label")(short(unit), fontsize=_SIZE)
    ax.tick_params(labelsize=_SIZE)
    ax.spines[["top", "right"]].set_visible(False)
    return ax
