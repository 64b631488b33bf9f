"""Csv files read in blocks: typed columns with line numbers, and problems of invalid rows.

A block is some megabytes of whole lines. It is parsed with the columns' types first. Only if that
fails is it parsed again, as text, to find the invalid rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.skip.data.arrays import Array
from maskmoe_kernels.experiments.skip.data.columns import ID_LENGTH, Column, parse_date

BLOCK_BYTES = 8 << 20
#: Longest line that is accepted, so that a file without newlines cannot fill the memory.
LINE_BYTES = 64 << 10
#: How many messages are kept of each kind of problem.
EXAMPLES = 5
_TRUE, _FALSE = ["true", "True"], ["false", "False"]
_INTEGER = r"^[+-]?[0-9]{1,9}$"
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?$"


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
    """An error message that names file and line."""
    return f"{path}, line {line}: expected {expected}, got {got}. {remedy}".rstrip()


class CsvFile:
    """One csv file, plain or gzip, that is read once from start to end.

    Args:
        path: A file that ends in ``.gz`` is decompressed while it is read.
        columns: The columns to read. The file may hold them in any order, and more.
        advance: Called with the number of (decompressed) bytes just read.
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[Column],
        advance: Callable[[int], None] = lambda count: None,
    ):
        self.path = path
        self.columns = {column.name: column for column in columns}
        self.problems = Problems()
        self.advance = advance
        self._header: list[str] = []
        self._digest = hashlib.sha256()

    @property
    def digest(self) -> str:
        """SHA-256 of the decompressed bytes read so far."""
        return self._digest.hexdigest()

    def blocks(self, size: int = BLOCK_BYTES) -> Iterator[Block]:
        """Yield the rows in blocks, and add the problems of invalid rows to ``problems``.

        Args:
            size: Bytes of a block, about.
        Raises:
            DataError: The file cannot be read, is empty, lacks a column, or has a line that is
                too long.
        """
        rest, line = b"", 1
        for data in self._read(size):
            head, newline, tail = (rest + data).rpartition(b"\n")
            rest = tail
            if len(rest) > LINE_BYTES:
                got = f"{len(rest):,} without a newline"
                expected = f"lines of up to {LINE_BYTES:,} bytes"
                raise DataError(line_message(self.path, line, expected, got))
            if newline:
                lines = head.count(b"\n") + 1
                yield from self._block(head + b"\n", line)
                line += lines
        if not self._header:
            got = f"{rest[:80]!r} without a newline" if rest else "an empty file"
            raise DataError(line_message(self.path, 1, "a header line", got))
        if rest:
            message = line_message(
                self.path, line, "a newline at the end of the last line", f"{rest[-60:]!r}",
                "The file is cut short; if it is whole, end it with a newline.",
            )  # fmt: skip
            self.problems.add("truncated", np.array([line]), lambda _: message)

    def _read(self, size: int) -> Iterator[bytes]:
        compression = "gzip" if self.path.suffix == ".gz" else None
        try:
            with pa.input_stream(str(self.path), compression=compression) as stream:
                while data := stream.read(size):
                    self._digest.update(data)
                    self.advance(len(data))
                    yield data
        except OSError as error:
            raise DataError(
                f"{self.path}: expected a readable csv file, whole where it is gzip, got "
                f"{error}. Download it again."
            ) from error

    def _block(self, data: bytes, line: int) -> Iterator[Block]:
        if not self._header:
            head, _, data = data.partition(b"\n")
            self._header = self._check_header(head.rstrip(b"\r").decode("utf-8", "replace"))
            line += 1
        if data:
            yield self._typed(data, line) or self._diagnosed(data, line)

    def _check_header(self, text: str) -> list[str]:
        header = text.removeprefix("\ufeff").split(",")
        missing = [name for name in self.columns if name not in header]
        if missing:
            raise DataError(
                line_message(
                    self.path, 1, f"the columns {', '.join(self.columns)}",
                    f"none named {', '.join(missing)} in {text[:200]!r}",
                    "Restore the official header.",
                )
            )  # fmt: skip
        if twice := sorted({name for name in header if header.count(name) > 1}):
            got = f"{twice} more than once"
            raise DataError(line_message(self.path, 1, "each column once", got))
        return header

    def _parse(self, data: bytes, types: dict[str, Any], handler: Any = None) -> Any:
        return csv.read_csv(
            pa.BufferReader(data),
            read_options=csv.ReadOptions(
                column_names=self._header, use_threads=False, block_size=len(data) + 1
            ),
            parse_options=csv.ParseOptions(
                quote_char=False, ignore_empty_lines=False, invalid_row_handler=handler
            ),
            convert_options=csv.ConvertOptions(
                column_types=types, include_columns=list(self.columns), null_values=[""],
                true_values=_TRUE, false_values=_FALSE, strings_can_be_null=True,
            ),
        ).combine_chunks()  # fmt: skip

    def _typed(self, data: bytes, line: int) -> Block | None:
        """The block parsed with the columns' types; None if a value does not fit its type."""
        types = {name: column.arrow for name, column in self.columns.items()}
        try:
            table = self._parse(data, types)
        except (pa.ArrowInvalid, pa.ArrowKeyError):
            return None
        arrays = {name: _only_chunk(table[name]) for name in self.columns}
        for name, array in arrays.items():
            if array.null_count or (self.columns[name].kind == "id" and not _are_ids(array).all()):
                return None
        lines = line + np.arange(len(table))
        valid = np.ones(len(table), bool)
        values: dict[str, Any] = {}
        for name, column in self.columns.items():
            array = arrays[name]
            values[name], in_range = _convert(column, array)
            self._add_problems(column, array, valid & ~in_range, lines)
            valid &= in_range
        return Block(values, lines, valid)

    def _diagnosed(self, data: bytes, line: int) -> Block:
        """The block parsed as text, so that each invalid field is found and reported."""
        skipped: list[Any] = []  # the first rows with a wrong number of fields, for the messages
        numbers: list[int] = []  # all of them, counted from 0 within the block

        def skip(row: Any) -> str:
            numbers.append(row.number - 1)  # pyarrow counts from 1
            if len(skipped) < EXAMPLES:
                skipped.append(row)
            return "skip"

        # pyarrow stops at bytes that are not UTF-8, so U+FFFD takes their place.
        data = data.decode("utf-8", "replace").encode()
        table = self._parse(data, dict.fromkeys(self.columns, pa.string()), skip)
        missing = np.array(numbers, np.int64)
        lines = line + np.delete(np.arange(len(table) + len(missing)), missing)
        self.problems.add(
            "fields",
            line + missing,
            lambda i: line_message(
                self.path, int(line + missing[i]), f"{len(self._header)} fields",
                f"{skipped[i].actual_columns} in {skipped[i].text[:120]!r}",
            ),
        )  # fmt: skip
        valid = np.ones(len(table), bool)
        values: dict[str, Any] = {}
        for name, column in self.columns.items():
            text = pc.fill_null(_only_chunk(table[name]), "")
            parsable = _is_parsable(column, text)
            array = pc.if_else(parsable, text, pa.scalar(None, pa.string()))
            array = array.dictionary_encode() if column.kind in ("name", "date") else array
            array = pc.fill_null(_cast(column, array), _placeholder(column))
            values[name], in_range = _convert(column, array)
            in_range &= np.asarray(parsable)
            self._add_problems(column, text, valid & ~in_range, lines)
            valid &= in_range
        return Block(values, lines, valid)

    def _add_problems(self, column: Column, fields: Any, invalid: Array, lines: Array) -> None:
        """Report the rows whose first invalid field is the one of ``column``.

        Args:
            column: The column of ``fields``.
            fields: pyarrow array, ``(n,)``, for the messages.
            invalid: ``(n,)`` bool.
            lines: ``(n,)``.
        """
        if not invalid.any():
            return
        rows = invalid.nonzero()[0]
        self.problems.add(
            f"bad {column.kind}",
            lines[rows],
            lambda i: line_message(
                self.path, int(lines[rows[i]]), f"{column.expected} in column {column.name}",
                repr(fields[int(rows[i])].as_py())[:90],
            ),
        )  # fmt: skip


def _only_chunk(column: Any) -> Any:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _are_ids(array: Any) -> Array:
    length = np.asarray(pc.binary_length(array))
    accepted: Array = (length > 0) & (length <= ID_LENGTH)
    return accepted


def _is_parsable(column: Column, text: Any) -> Any:
    """Whether each text can be parsed as the column's type, a pyarrow array ``(n,)`` of bool."""
    match column.kind:
        case "id":
            return pa.array(_are_ids(text))
        case "flag":
            return pc.is_in(text, pa.array(_TRUE + _FALSE))
        case "integer":
            return pc.match_substring_regex(text, _INTEGER)
        case "number":
            return pc.match_substring_regex(text, _NUMBER)
    return pa.array(np.ones(len(text), bool))


def _cast(column: Column, array: Any) -> Any:
    if column.kind == "flag":
        return pc.is_in(array, pa.array(_TRUE))
    if column.kind in ("integer", "number"):
        return pc.utf8_ltrim(array, "+").cast(column.arrow)
    return array


def _placeholder(column: Column) -> Any:
    """What stands for a field that cannot be parsed."""
    if column.kind == "flag":
        return False
    if column.kind in ("integer", "number"):
        return pa.scalar(0, column.arrow)
    return ""


def _convert(column: Column, array: Any) -> tuple[Any, Array]:
    """The values as :class:`Block` holds them, and which are valid values of the column.

    Returns:
        Values ``(n,)`` and ``(n,)`` bool.
    """
    if column.kind == "id":
        return array, np.ones(len(array), bool)
    if column.kind in ("name", "date"):
        if column.kind == "date":
            known = [parse_date(text) for text in array.dictionary.to_pylist()]
        else:
            codes = {name: code for code, name in enumerate(column.names)}
            known = [codes.get(text) for text in array.dictionary.to_pylist()]
        index = np.asarray(array.indices)
        in_range = np.array([code is not None for code in known], bool)[index]
        return np.array([code or 0 for code in known], np.int32)[index], in_range
    values = array.to_numpy(zero_copy_only=False)
    if column.kind == "flag":
        return values, np.ones(len(values), bool)
    return values, (values >= column.low) & (values <= column.high)  # False for NaN
