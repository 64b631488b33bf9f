"""How one column becomes codes: what is fitted on the training rows, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from maskmoe_kernels.estimators.tables import Array

#: Rows of a table of categories that are no category.
UNSEEN, MISSING, FIRST = 0, 1, 2
#: From this share of the rows on, a value gets a code of its own.
_HEAVY = 0.05
#: Where a value has so many rows on average, values are codes or names rather than measurements,
#: and a function of them need not be smooth: there may be so many times as many bins.
_ROWS_PER_VALUE, _FINER = 20, 4
#: Units of an embedding at the most; up to so many rows, it begins as one unit a row.
_WIDEST = 16
#: Bins of the picture of a distribution.
_SPREAD = 30
_ARRAYS = ("edges", "heavy", "mean", "spread")


@dataclass(frozen=True)
class NumericColumn:
    """Piecewise-linear codes of a column of numbers.

    With edges ``e_0 < e_1 < ... < e_B``, code b is ``clip((x - e_b-1) / (e_b - e_b-1), 0, 1)``
    (Gorishniy et al., *On Embeddings for Numerical Features in Tabular Deep Learning*, 2022), less
    its mean over the training rows. A linear map of the codes is any piecewise-linear function of
    x; beyond the edges it is constant. After them come one code for each heavy value v (1 if
    ``x == v``, less its mean), and a last one, which is 1 if x is missing: the others are then 0,
    their mean.

    Attributes:
        name: Of the column.
        edges: ``(B + 1,)`` float64, ascending; or one, where the column is constant, or none.
        heavy: Values that at least 5 % of the rows have, ``(V,)``.
        mean: Of the codes of edges and of heavy values, ``(B + V,)``.
        spread: Share of the training rows in 30 bins of equal width from the first edge to the
            last, for pictures.
        missing: Share of the training rows in which it is missing.
    """

    name: str
    edges: Array
    heavy: Array
    mean: Array
    spread: Array
    missing: float

    @property
    def width(self) -> int:
        """Codes of a row: B + V + 1."""
        return len(self.mean) + 1

    @classmethod
    def fitted(cls, name: str, x: Array, weight: Array, bins: int) -> NumericColumn:
        """The column of training rows ``x`` ``(rows,)``, each counted ``weight`` times.

        Args:
            name: Of the column.
            x: NaN where missing.
            weight: Above 0, ``(rows,)``.
            bins: B at the most; four times as many where a value has 20 rows on average.
        """
        there = ~np.isnan(x)
        missing = float(weight[~there].sum() / weight.sum())
        x, weight = x[there], weight[there]
        values, at = np.unique(x, return_inverse=True)
        share = np.bincount(at, weight, minlength=len(values))
        share = share / share.sum() if len(values) else share
        bins = bins * _FINER if len(x) >= _ROWS_PER_VALUE * len(values) else bins
        heavy = values[share >= _HEAVY] if len(values) > bins + 1 else values[:0]
        light = ~np.isin(values, heavy)
        edges = _weighted_quantiles(values[light], share[light], bins)
        edges = edges if len(values) < 2 else np.unique([values[0], *edges, values[-1]])
        spread = np.zeros(_SPREAD)
        if len(edges):
            at = np.histogram(values, _SPREAD, (edges[0], edges[-1]), weights=share)[0]
            spread = at / at.sum()
        mean = np.zeros(max(len(edges) - 1, 0) + len(heavy))
        raw = cls(name, edges, heavy, mean, spread, missing)
        mean = share @ raw.codes(values).astype(np.float64)[:, :-1]
        return cls(name, edges, heavy, mean, spread, missing)

    def codes(self, x: Array) -> Array:
        """Numbers ``(rows,)`` to codes ``(rows, width)``, float32."""
        codes = np.zeros((len(x), self.width), dtype=np.float32)
        missing = np.isnan(x)
        bins = max(len(self.edges) - 1, 0)
        if bins:
            low, size = self.edges[:-1], np.diff(self.edges)
            codes[:, :bins] = np.clip((x[:, None] - low) / size, 0, 1)
        codes[:, bins:-1] = x[:, None] == self.heavy
        codes[:, :-1] -= self.mean.astype(np.float32)
        codes[missing] = 0
        codes[missing, -1] = 1
        return codes

    def to_json(self) -> dict[str, Any]:
        """Plain values, for :func:`column_from_json`."""
        values = {key: getattr(self, key).tolist() for key in _ARRAYS}
        return {"kind": "numbers", "name": self.name, "missing": self.missing, **values}


def _weighted_quantiles(values: Array, share: Array, bins: int) -> Array:
    """Ascending values that cut the others into ``bins`` parts of about equal weight."""
    if len(values) <= bins + 1:
        return values
    total = np.cumsum(share)
    # Half of a rounding error must not move an edge: rows and their weights give the same one.
    wanted = np.linspace(0, 1, bins + 1) * total[-1] * (1 - 1e-12)
    chosen: Array = values[np.minimum(np.searchsorted(total, wanted), len(values) - 1)]
    return np.unique(chosen)


@dataclass(frozen=True)
class CategoricalColumn:
    """Rows of an embedding table, one a category.

    Row 0 is for categories that training did not have or that were too rare to be among
    ``categories``, row 1 for missing ones.

    Attributes:
        name: Of the column.
        categories: The most frequent first.
        share: Of the training rows in each row of the table, ``(rows of the table,)``.
    """

    name: str
    categories: tuple[str, ...]
    share: Array

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return FIRST + len(self.categories)

    @property
    def width(self) -> int:
        """Units of an embedding."""
        return min(self.rows, _WIDEST)

    @classmethod
    def fitted(cls, name: str, x: Array, weight: Array, most: int) -> CategoricalColumn:
        """The column of training rows ``x``, ``(rows,)`` of text or ``None``.

        Args:
            name: Of the column.
            x: ``None`` where missing.
            weight: How often each row counts, ``(rows,)``.
            most: Categories that get a row of their own, at the most.
        """
        there = np.array([value is not None for value in x], dtype=bool)
        values, at = np.unique(x[there].astype(str), return_inverse=True)
        count = np.bincount(at, weight[there], minlength=len(values))
        order = np.lexsort((values, -count))[:most]
        kept = cls(name, tuple(values[order].tolist()), np.zeros(FIRST + len(order)))
        share = np.bincount(kept.ids(x), weight, minlength=kept.rows) / weight.sum()
        return cls(name, kept.categories, share)

    def ids(self, x: Array) -> Array:
        """Text ``(rows,)`` to rows of the table, ``(rows,)`` int64."""
        row = {category: FIRST + k for k, category in enumerate(self.categories)}
        found = [MISSING if value is None else row.get(value, UNSEEN) for value in x]
        return np.array(found, dtype=np.int64)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for :func:`column_from_json`."""
        return {
            "kind": "categories",
            "name": self.name,
            "categories": list(self.categories),
            "share": self.share.tolist(),
        }


Column = NumericColumn | CategoricalColumn


def column_from_json(record: dict[str, Any]) -> Column:
    """The column that ``to_json`` described.

    Raises:
        KeyError, TypeError, ValueError: It is no such description.
    """
    name = str(record["name"])
    if record["kind"] == "categories":
        categories = tuple(str(category) for category in record["categories"])
        share = np.array(record["share"], dtype=np.float64)
        if len(share) != FIRST + len(categories):
            raise ValueError(f"column {name!r}: {len(share)} shares, {len(categories)} categories")
        return CategoricalColumn(name, categories, share)
    edges, heavy, mean, spread = (np.array(record[key], dtype=np.float64) for key in _ARRAYS)
    if len(mean) != max(len(edges) - 1, 0) + len(heavy) or (np.diff(edges) <= 0).any():
        raise ValueError(f"column {name!r}: edges, heavy values and means do not fit")
    return NumericColumn(name, edges, heavy, mean, spread, float(record["missing"]))
