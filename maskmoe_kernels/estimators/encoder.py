"""All columns of a table as the input of a network: codes side by side, ids of embedding rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskmoe_kernels.estimators.columns import (
    CategoricalColumn,
    Column,
    NumericColumn,
    column_from_json,
)
from maskmoe_kernels.estimators.tables import CATEGORIES, Array, Table
from maskmoe_kernels.ops.masked_mlp.call import Inputs

#: Numbers that are computed at once, so that temporary float64 arrays stay small.
_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Codes:
    """Encoded rows.

    Attributes:
        numbers: Codes of the numeric columns, ``(rows, codes)`` float32.
        ids: Of each categorical column, the row of its table, ``(columns, rows)`` int64.
    """

    numbers: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.numbers)

    def taken(self, rows: Tensor) -> Codes:
        """The rows of these numbers."""
        return Codes(self.numbers.index_select(0, rows), self.ids.index_select(1, rows))

    def to(self, device: torch.device) -> Codes:
        """The same on a device."""
        return Codes(self.numbers.to(device), self.ids.to(device))


@dataclass(frozen=True)
class Encoder:
    """What was fitted to each column, and which columns make a group.

    Attributes:
        columns: In the order of the table.
        groups: Name to the positions of its columns.
    """

    columns: Sequence[Column]
    groups: Mapping[str, Sequence[int]]

    @classmethod
    def fitted(
        cls,
        table: Table,
        groups: Mapping[str, Sequence[int]],
        weight: Array,
        bins: int,
        categories: int,
    ) -> Encoder:
        """The encoder of the training rows.

        Args:
            table: Of the training rows.
            groups: See above.
            weight: How often each row counts, ``(rows,)``.
            bins: Of a numeric column, at the most.
            categories: Of a categorical column that get a row of their own, at the most.
        """
        columns: list[Column] = []
        for name, kind, x in zip(table.names, table.kinds, table.columns, strict=True):
            if kind == CATEGORIES:
                columns.append(CategoricalColumn.fitted(name, x, weight, categories))
            else:
                columns.append(NumericColumn.fitted(name, x, weight, bins))
        return cls(columns, groups)

    @property
    def names(self) -> list[str]:
        """Of the columns."""
        return [column.name for column in self.columns]

    @property
    def widths(self) -> dict[str, int]:
        """Group to its width in the input of the network."""
        return {
            name: sum(self.columns[k].width for k in members)
            for name, members in self.groups.items()
        }

    @property
    def tables(self) -> list[CategoricalColumn]:
        """The columns with an embedding table, in the order of the groups."""
        return [c for c in self._in_order() if isinstance(c, CategoricalColumn)]

    def codes(self, table: Table) -> Codes:
        """Encode rows.

        Raises:
            ValueError: A column holds text where it held numbers in ``fit``, or the reverse.
        """
        arrays = self._checked(table)
        numeric = [k for k in self._order() if isinstance(self.columns[k], NumericColumn)]
        width = sum(self.columns[k].width for k in numeric)
        numbers = np.empty((table.rows, width), dtype=np.float32)
        start = 0
        for k in numeric:
            column = self.columns[k]
            end = start + column.width
            for first in range(0, table.rows, _AT_ONCE):
                rows = slice(first, first + _AT_ONCE)
                numbers[rows, start:end] = column.codes(arrays[k][rows])  # type: ignore[union-attr]
            start = end
        ids = [
            column.ids(arrays[k])
            for k in self._order()
            if isinstance(column := self.columns[k], CategoricalColumn)
        ]
        stacked = np.stack(ids) if ids else np.zeros((0, table.rows), dtype=np.int64)
        return Codes(torch.from_numpy(numbers), torch.from_numpy(stacked))

    def inputs(self, codes: Codes, tables: Sequence[Tensor]) -> Inputs:
        """The input of the network: codes and embedding rows, group by group.

        Args:
            codes: Rows.
            tables: Of the categorical columns, in the order of :attr:`tables`.
        """
        order, table = [], 0
        for column in self._in_order():
            if isinstance(column, CategoricalColumn):
                order.append(table)
                table += 1
            elif order and order[-1] < 0:
                order[-1] -= column.width
            else:
                order.append(-column.width)
        x = codes.numbers if codes.numbers.shape[1] else None
        return Inputs(x, tables, [*codes.ids.unbind()], order)

    def lines(self) -> Array:
        """Weights of the inputs that make each numeric column, up to a constant.

        ``(inputs, numeric columns)``: ``inputs @ lines`` are the columns, cut off at their outer
        edges.
        """
        numeric = [column for column in self._in_order() if isinstance(column, NumericColumn)]
        lines = np.zeros((sum(column.width for column in self.columns), len(numeric)))
        start = place = 0
        for column in self._in_order():
            if isinstance(column, NumericColumn):
                widths = np.diff(column.edges)
                lines[start : start + len(widths), place] = widths
                place += 1
            start += column.width
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain values, for :meth:`from_json`."""
        return {
            "columns": [column.to_json() for column in self.columns],
            "groups": {name: list(members) for name, members in self.groups.items()},
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Encoder:
        """The encoder that :meth:`to_json` described.

        Raises:
            KeyError, TypeError, ValueError: It is no such description.
        """
        columns = [column_from_json(column) for column in record["columns"]]
        groups = {str(name): [int(k) for k in ks] for name, ks in record["groups"].items()}
        if sorted(k for ks in groups.values() for k in ks) != list(range(len(columns))):
            raise ValueError("the groups do not hold every column once")
        return cls(columns, groups)

    def _order(self) -> list[int]:
        return [k for members in self.groups.values() for k in members]

    def _in_order(self) -> list[Column]:
        return [self.columns[k] for k in self._order()]

    def _checked(self, table: Table) -> list[Array]:
        arrays = []
        for column, kind, x in zip(self.columns, table.kinds, table.columns, strict=True):
            wants_text = isinstance(column, CategoricalColumn)
            if wants_text == (kind == CATEGORIES):
                arrays.append(x)
            elif wants_text and np.isnan(x).all():
                arrays.append(np.full(len(x), None, dtype=object))
            elif not wants_text and all(value is None for value in x):
                arrays.append(np.full(len(x), np.nan))
            else:
                raise ValueError(_changed(column, x))
        return arrays


def _changed(column: Column, x: Array) -> str:
    if isinstance(column, CategoricalColumn):
        return (
            f"column {column.name!r} held text or categories in fit and holds numbers now, "
            f"{x[~np.isnan(x)][0]:g} for instance; pass the same kind: column.astype(str)"
        )
    shown = next(value for value in x if value is not None)
    return (
        f"column {column.name!r} held numbers in fit and holds text now, {shown!r} for instance; "
        "make it numbers again, with NaN for what is none (pandas.to_numeric(column, "
        "errors='coerce'))"
    )
