"""Blocks of checked rows, and the problems that are found in them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.skip.data.arrays import Array
from maskmoe_kernels.experiments.skip.data.packed import ROW_ENDINGS
from maskmoe_kernels.experiments.skip.schema.column import ID_LENGTH, UNITS, Column

#: How many messages are kept of each kind of problem.
EXAMPLES = 5
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?$"
_ISO_TIME = re.compile(
    r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,6})?)?(Z|[+-]\d\d(:?\d\d)?)?)?", re.ASCII
)
#: Times from 1970 to 2200, in ms.
LAST_TIME = 7_258_118_400_000


@dataclass
class Problems:
    """The problems found in one file.

    Attributes:
        counts: Kind of problem -> number of rows or sessions.
        examples: Kind of problem -> its first messages, at most ``EXAMPLES``.
        first: Line and message of the problem with the lowest line number since the last call of
            :meth:`raise_first`.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    first: tuple[int, str] | None = None

    def add(self, kind: str, lines: Array, describe: Callable[[int], str]) -> None:
        """Add a problem of one kind at each of ``lines``.

        Args:
            kind: A key of ``counts``.
            lines: Line numbers, ascending, ``(n,)``.
            describe: Index into ``lines`` to the message.
        """
        if not len(lines):
            return
        self.counts[kind] = self.counts.get(kind, 0) + len(lines)
        kept = self.examples.setdefault(kind, [])
        kept += [describe(i) for i in range(min(len(lines), EXAMPLES - len(kept)))]
        if self.first is None or lines[0] < self.first[0]:
            self.first = int(lines[0]), describe(0)

    def raise_first(self, strict: bool) -> None:
        """Raise the first problem if ``strict``; otherwise forget which one was first.

        Raises:
            DataError: ``strict``, and a problem was added since the last call.
        """
        if strict and self.first is not None:
            raise DataError(self.first[1])
        self.first = None


@dataclass(frozen=True)
class Block:
    """Consecutive rows of one file.

    Attributes:
        values: Column name -> ``(n,)``: a pyarrow string array for ids, else a numpy array. Names
            are indices into ``Column.names``; dates are days since 1970-01-01.
        lines: Line number of each row, ``(n,)`` int64.
        valid: Whether all values of the row are valid, ``(n,)`` bool.
    """

    values: dict[str, Any]
    lines: Array
    valid: Array


def line_message(path: Path, line: int, expected: str, got: str, remedy: str = "") -> str:
    """An error message that names file and line; of parquet and arrow files, the row."""
    unit = "row" if path.suffix in ROW_ENDINGS else "line"
    return f"{path}, {unit} {line}: expected {expected}, got {got}. {remedy}".rstrip()


def add_invalid(
    path: Path, problems: Problems, column: Column, fields: Any, invalid: Array, lines: Array
) -> None:
    """Report the rows whose first invalid field is the one of ``column``.

    Args:
        path: The file.
        problems: Where they are added.
        column: The column of ``fields``.
        fields: pyarrow array, ``(n,)``, for the messages.
        invalid: ``(n,)`` bool.
        lines: ``(n,)``.
    """
    if not invalid.any():
        return
    rows = invalid.nonzero()[0]
    problems.add(
        f"bad {column.kind}",
        lines[rows],
        lambda i: line_message(
            path, int(lines[rows[i]]), f"{column.expected} in column {column.name}",
            repr(fields[int(rows[i])].as_py())[:90], column.remedy,
        ),
    )  # fmt: skip


def arrow_type(column: Column) -> Any:
    """The pyarrow type as which a csv column is parsed."""
    match column.kind:
        case "id" | "time":
            return pa.string()
        case "flag":
            return pa.bool_()
        case "integer":
            return pa.int32()
        case "number":
            return pa.float64()
    return pa.dictionary(pa.int32(), pa.string())  # few distinct values: each is parsed once


def only_chunk(column: Any) -> Any:
    """A chunked array as one array."""
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def are_ids(array: Any) -> Array:
    """Which texts of a pyarrow array are ids, ``(n,)`` bool."""
    length = np.asarray(pc.binary_length(array))
    accepted: Array = (length > 0) & (length <= ID_LENGTH)
    return accepted


def parsable_text(column: Column, text: Any) -> tuple[Any, Array | None]:
    """The text of one column as :func:`convert_column` takes it, and where a number can be parsed.

    Returns:
        pyarrow array ``(n,)``, and ``(n,)`` bool, or None for all. What cannot be parsed as a
        number is 0.
    """
    if column.kind == "id":
        return text, are_ids(text)
    if column.kind == "time":
        return text, None
    if column.kind != "number":
        return text.dictionary_encode(), None
    text = pc.utf8_trim(text, " \t")
    parsable = pc.match_substring_regex(text, _NUMBER)
    number = pc.if_else(parsable, pc.utf8_ltrim(text, "+"), "0").cast(arrow_type(column))
    return number, np.asarray(parsable)


def convert_column(column: Column, array: Any, parsable: Array | None = None) -> tuple[Any, Array]:
    """The values as :class:`Block` holds them, and which are valid values of the column.

    Args:
        column: The column.
        array: pyarrow array ``(n,)``: ids, values of the column's type, or a dictionary of texts.
        parsable: Which values count, ``(n,)`` bool; None: all.
    Returns:
        Values ``(n,)`` and ``(n,)`` bool.
    """
    in_range = np.ones(len(array), bool) if parsable is None else parsable
    if column.kind == "id":
        return array, in_range
    if column.kind == "time":
        return parse_times(column, array)
    if pa.types.is_dictionary(array.type):
        found = [column.parse(text) for text in array.dictionary.to_pylist()]
        index = np.asarray(array.indices)
        in_range = in_range & np.array([value is not None for value in found], bool)[index]
        values = np.array([value or 0 for value in found], np.int32)[index]
    else:
        values = array.to_numpy(zero_copy_only=False)
    if column.kind == "flag":
        return values.astype(bool), in_range
    if column.kind in ("integer", "number"):  # False for NaN
        in_range = in_range & (values >= column.low) & (values <= column.high)
    return values, in_range


def parse_times(column: Column, text: Any) -> tuple[Array, Array]:
    """Times in ms since 1970, and which of the texts are times.

    Args:
        column: A column of the kind ``time``.
        text: pyarrow strings ``(n,)``: whole numbers of ``column.unit``, or like
            ``2018-07-15T20:15:00``, of UTC if they name no other offset.
    Returns:
        ``(n,)`` int64 and ``(n,)`` bool.
    """
    text = pc.utf8_trim(pc.fill_null(text, ""), " \t")
    digits = pc.match_substring_regex(text, r"^[0-9]{1,13}$")
    values = pc.if_else(digits, text, "0").cast(pa.int64()).to_numpy() * UNITS[column.unit]
    valid = np.array(digits)
    for i in (~valid).nonzero()[0].tolist():
        found = _instant(text[i].as_py())
        if found is not None:
            values[i], valid[i] = found, True
    return values, valid & (values >= 0) & (values <= LAST_TIME)


def _instant(text: str) -> int | None:
    if not _ISO_TIME.fullmatch(text):
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1000)
