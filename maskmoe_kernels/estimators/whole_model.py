"""What a model does on the whole: importance, shape functions, pairs, who suffices; its report."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import Tensor

from maskmoe_kernels.estimators.columns import MISSING, CategoricalColumn, Column, NumericColumn
from maskmoe_kernels.estimators.encoder import Encoder
from maskmoe_kernels.estimators.plots import bars, curve, heat_map, levels, number, shorter
from maskmoe_kernels.estimators.subsets import ERRORS, SubsetGain
from maskmoe_kernels.estimators.tables import CATEGORIES, NUMBERS, Array, Table
from maskmoe_kernels.files import replacing
from maskmoe_kernels.layout.subsets import SubsetFamily

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Points of a curve besides the edges, cells of a side of a heat map, categories in a picture.
_POINTS, _SIDE, _CATEGORIES = 64, 24, 24
#: Bars of importance, and rows of the table of who suffices; pixels of an inch of a picture.
_BARS, _PIXELS = 20, 82
#: From a table to the values of all experts.
Values = Callable[[Table], Tensor]


@dataclass(frozen=True)
class Shape:
    """What the expert of a single column answers, over the values of that column.

    Attributes:
        name: Of the column.
        x: Numbers, ascending, or names of categories, ``(points,)``.
        y: Its answer, ``(points,)`` or ``(points, classes)``.
        missing: Its answer where the column is missing; ``None`` if no training row missed it.
        spread: Shares of the training rows: of each category, or in bins of equal width.
    """

    name: str
    x: Array
    y: Array
    missing: Any
    spread: Array

    def to_frame(self, classes: Sequence[Any] = ()) -> pd.DataFrame:
        """A row a point: ``value``, and ``answer``, or a column for each class."""
        columns = ["answer"] if self.y.ndim == 1 else [str(name) for name in classes]
        frame = pd.DataFrame(self.y.reshape(len(self.x), -1), columns=columns)
        frame.insert(0, "value", self.x)
        return frame


@dataclass(frozen=True)
class PairMap:
    """What the expert of two columns adds to those of each: ``v(gh) - v(g) - v(h) + base``.

    Attributes:
        names: Of the two columns.
        x: Values of the first, in words.
        y: Values of the second.
        z: ``(len(y), len(x))``; of several classes, of the last.
    """

    names: tuple[str, str]
    x: list[str]
    y: list[str]
    z: Array


@dataclass(frozen=True)
class GlobalExplanation:
    """Of a fitted estimator.

    Attributes:
        importance: Group to the mean of the absolute contribution over at most 1000 training rows
            (of several classes, over them, too), the largest first.
        sufficient: Name of an expert to the share of these rows of which it is the smallest that
            suffices, the largest first.
        subsets: Name of an expert to the groups that it sees.
        gains: What forward selection found about each subset, best first; else empty.
        shapes: Group to its shape function, for groups of one column with an expert of their own.
        pairs: Pairs of such groups with an expert.
        base: The answer before any column is seen.
        tolerance: Of sufficiency.
        unit: Of all answers, in words.
        classes: Labels, ``None`` for a regression.
    """

    importance: pd.Series
    sufficient: pd.Series
    subsets: dict[str, tuple[str, ...]]
    gains: list[SubsetGain]
    shapes: dict[str, Shape]
    pairs: list[PairMap]
    base: Any
    tolerance: float
    unit: str
    classes: list[Any] | None

    def to_frame(self) -> pd.DataFrame:
        """A row a group: its importance, and the share of rows for which it alone suffices."""
        alone = self.sufficient.reindex(self.importance.index).fillna(0.0)
        return pd.DataFrame({"importance": self.importance, "suffices alone": alone})

    def plot(self, name: str | tuple[str, str] | None = None) -> Axes:
        """A picture: of a group's shape function, of a pair, or (``None``) of the importance.

        Raises:
            ValueError: The group or pair has no expert of its own, or several columns.
        """
        if name is None:
            top = self.importance.iloc[:_BARS]
            few = "" if len(top) == len(self.importance) else f", first {_BARS} of all groups"
            return bars([*top.index], top.to_numpy(), f"mean |contribution|, {self.unit}{few}")
        if isinstance(name, str) and name in self.shapes:
            return self._plot_shape(self.shapes[name])
        for pair in self.pairs:
            if pair.names == name:
                return heat_map(pair.x, pair.y, pair.z, pair.names, self._pair_unit)
        raise ValueError(
            f"there is no picture of {name!r}; groups: {[*self.shapes][:20]}, pairs: "
            f"{[pair.names for pair in self.pairs][:20]}"
        )

    def _plot_shape(self, shape: Shape) -> Axes:
        classes = [str(name) for name in self.classes or ()]
        tells = shape.name, self.unit
        if shape.x.dtype == object:
            return levels([*shape.x], shape.y, shape.spread, self.base, *tells, classes)
        return curve(shape.x, shape.y, shape.spread, *tells, shape.missing, classes)

    @property
    def _pair_unit(self) -> str:
        many = self.classes is not None and len(self.classes) > 2
        return f"{self.unit} of {self.classes[-1]}" if self.classes and many else self.unit

    def report(self, path: str | Path, title: str = "What the model does") -> Path:
        """Write one html file that needs no other, in place of one that was there.

        Args:
            path: Of the file.
            title: Of the page.

        Raises:
            OSError: It cannot be written.
        """
        tells = html.escape(self.unit)
        parts = ["<h2>Importance</h2>"]
        if self.importance.isna().any():
            parts.append("<p>Unknown: the subsets do not tell the groups apart.</p>")
        else:
            parts.append(
                f"<p>How far each group moves an answer: the mean of its absolute contribution "
                f"over training rows, in {tells}.</p>"
            )
            parts.append(_picture(self.plot(), "Importance of each group"))
        shapes = [name for name in self.importance.index if name in self.shapes]
        if shapes:
            parts.append(
                f"<h2>Single columns</h2><p>What the model answers, in {tells}, where it sees this "
                "column alone. Grey, and in percent: the distribution of the training rows.</p>"
            )
            parts.append(_grid_of(_picture(self.plot(s), f"Shape function of {s}") for s in shapes))
        if self.pairs:
            parts.append(
                f"<h2>Pairs</h2><p>What two columns together add to what each says alone, in "
                f"{html.escape(self._pair_unit)}.</p>"
            )
            parts.append(
                _grid_of(_picture(self.plot(p.names), f"Pair {p.names}") for p in self.pairs)
            )
        parts.append(
            f"<h2>Who suffices</h2><p>Of how many rows each expert is the smallest whose answer is "
            f"within {number(self.tolerance)} ({tells}) of the one that sees all.</p>"
        )
        parts.append(self._table())
        if self.gains:
            parts.append(self._kept_and_why())
        page = _PAGE.format(title=html.escape(title), body="\n".join(parts))
        with replacing(path) as file:
            file.write(page.encode("utf-8"))
        return Path(path)

    def _table(self) -> str:
        """The largest shares of sufficiency, and the sum of all others, in html."""
        there = self.sufficient[self.sufficient > 0]
        first, others = there.iloc[:_BARS], there.iloc[_BARS:]
        rows = [(self._in_words(name), share) for name, share in first.items()]
        if len(others):
            rows.append((f"{len(others)} others", float(others.sum())))
        return _html_table(["groups", "rows"], [[name, f"{share:.1%}"] for name, share in rows])

    def _kept_and_why(self) -> str:
        """The subsets of two groups or more that gained most, in html."""
        larger = [found for found in self.gains if len(found.groups) > 1]
        kept = sum(found.kept for found in larger)
        unit = "nats of the log loss" if self.classes else "shares of the variance of y"
        text = (
            f"<h2>What was kept and why</h2><p>Besides single groups, {kept} of {len(larger)} "
            "subsets that were tried got an expert. Gain: by how much one loses less on held-out "
            f"rows than the best kept subset with one group less, in {unit}, and its standard "
            f"error. One that gains at most {number(ERRORS)} errors is not kept, nor one for which "
            "there was no room.</p>"
        )
        rows = [
            [" & ".join(found.groups), f"{found.gain:.4f} \u00b1 {found.error:.4f}",
             "kept" if found.kept else ""]
            for found in larger[:_BARS]
        ]  # fmt: skip
        if len(larger) > _BARS:
            others = sum(found.kept for found in larger[_BARS:])
            rows.append([f"{len(larger) - _BARS} others", "", f"{others} kept"])
        return text + _html_table(["groups", "gain", ""], rows) if larger else ""

    def _in_words(self, expert: Any) -> str:
        prefix, groups = shorter(self.subsets[expert], [*self.importance.index])
        return f"{prefix}{' & '.join(groups)}" if prefix and groups else str(expert)


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1100px; padding: 1rem; }}
img {{ max-width: 100%; height: auto; }}
.grid {{ display: grid; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 345px), 1fr)); }}
table {{ border-collapse: collapse; }} td, th {{ padding: .2rem .8rem; text-align: left;
  border-bottom: 1px solid #ccc; overflow-wrap: anywhere; }}
td + td, th + th {{ text-align: right; white-space: nowrap; }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def _html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    first = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table><tr>{first}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _grid_of(pictures: Iterable[str]) -> str:
    return f"<div class=grid>{''.join(pictures)}</div>"


def _picture(ax: Axes, alt: str) -> str:
    """An ``img`` of its own pixels, twice as many as it is wide on a screen."""
    figure: Any = ax.figure
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=2 * _PIXELS)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    width = round(_PIXELS * figure.get_figwidth())
    return f'<img alt="{html.escape(alt)}" width={width} src="data:image/png;base64,{data}">'


def shapes_of(encoder: Encoder, family: SubsetFamily, values: Values) -> dict[str, Shape]:
    """The shape function of every group of one column that has an expert of its own."""
    found = {}
    expert = {members: k for k, members in enumerate(family.subsets.values())}
    for group, members in encoder.groups.items():
        if len(members) != 1 or (group,) not in expert:
            continue
        column = encoder.columns[members[0]]
        grid = _grid(column, _POINTS)
        y = values(_only(encoder, {members[0]: grid}))[:, expert[(group,)]].numpy()
        missing: Any = y[-1]
        if isinstance(column, CategoricalColumn):
            shares = [column.share[k] for k in column.ids(grid)]
            keep = np.arange(len(grid) - (column.share[MISSING] == 0))
            names = np.array(["missing" if v is None else v for v in grid], dtype=object)
            found[group] = Shape(group, names[keep], y[keep], None, np.array(shares)[keep])
        else:
            there = None if column.missing == 0 else missing
            found[group] = Shape(group, grid[:-1], y[:-1], there, column.spread)
    return found


def pairs_of(
    encoder: Encoder, family: SubsetFamily, base: float | Array, values: Values, most: int = 24
) -> list[PairMap]:
    """What each pair of columns with an expert adds, for the first ``most`` of them."""
    expert = {members: k for k, members in enumerate(family.subsets.values())}
    found: list[PairMap] = []
    for names, k in expert.items():
        single = [expert.get((name,)) for name in names]
        if len(names) != 2 or None in single or len(found) == most:
            continue
        a, b = (encoder.groups[name] for name in names)
        if len(a) != 1 or len(b) != 1:
            continue
        xs, ys = (_coarse(_grid(encoder.columns[c[0]], _SIDE)) for c in (a, b))
        columns = {a[0]: np.tile(xs, len(ys)), b[0]: np.repeat(ys, len(xs))}
        v = values(_only(encoder, columns)).numpy()
        z = v[:, k] - v[:, single[0]] - v[:, single[1]] + base
        z = z if z.ndim == 1 else z[:, -1]
        pair = (names[0], names[1])
        found.append(PairMap(pair, _in_words(xs), _in_words(ys), z.reshape(len(ys), len(xs))))
    return found


def _in_words(values: Array) -> list[str]:
    return [value if isinstance(value, str) else number(value, digits=4) for value in values]


def _grid(column: Column, points: int) -> Array:
    """Values of a column, ascending or most frequent first, and at the end a missing one."""
    if isinstance(column, CategoricalColumn):
        return np.array([*column.categories[:_CATEGORIES], None], dtype=object)
    ends = column.edges[[0, -1]] if len(column.edges) else np.zeros(1)
    values = np.union1d(column.edges, column.heavy)
    if len(column.edges) > 1 and _has_few_values(column, values):
        return np.append(values, np.nan)
    between = np.linspace(ends[0], ends[-1], points)
    edges = column.edges if len(column.edges) < 2 * points else column.edges[:0]
    return np.append(np.unique(np.concatenate([between, edges, column.heavy])), np.nan)


def _has_few_values(column: NumericColumn, values: Array) -> bool:
    """Whether all training rows have one of the values: between 0 and 1 of a boolean is nothing."""
    low, high, bins = column.edges[0], column.edges[-1], len(column.spread)
    at = ((values - low) / (high - low) * bins).astype(np.int64).clip(0, bins - 1)
    return 2 * len(values) < bins and not np.delete(column.spread, at).any()


def _coarse(grid: Array) -> Array:
    """At most ``_SIDE`` values of a grid, without the missing one."""
    there = grid[:-1]
    at = np.unique(np.linspace(0, len(there) - 1, min(_SIDE, len(there))).astype(np.int64))
    coarse: Array = there[at]
    return coarse


def _only(encoder: Encoder, given: dict[int, Array]) -> Table:
    """A table in which all columns but these are missing: experts of others do not see them."""
    rows = len(next(iter(given.values())))
    kinds, columns = [], []
    for k, column in enumerate(encoder.columns):
        text = isinstance(column, CategoricalColumn)
        empty = np.full(rows, None, dtype=object) if text else np.full(rows, np.nan)
        kinds.append(CATEGORIES if text else NUMBERS)
        columns.append(given.get(k, empty))
    return Table(encoder.names, kinds, columns, rows)
