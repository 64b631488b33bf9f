"""Csv in blocks: typed columns with line numbers, and the rows that are not as they should be.

A block is some megabytes of whole lines. It is parsed with its types at once; only where that
fails is it parsed again as text, to find which rows are to blame.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.skip.data.mssd_columns import ID_LENGTH, Column, parse_date

Array = npt.NDArray[Any]

BLOCK_BYTES = 8 << 20
#: No row is as long as this: what goes on without a newline is no csv, packed or not.
LINE_BYTES = 64 << 10
#: Messages kept of each kind of problem.
EXAMPLES = 5
_TRUE, _FALSE = ["true", "True"], ["false", "False"]
_INTEGER = r"^[+-]?[0-9]{1,9}$"
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?$"


@dataclass
class Problems:
    """What is wrong with one file: how often each kind, the first few of each, the first of all.

    Attributes:
        counts: Kind -> number of rows or sessions.
        examples: Kind -> the first messages.
        first: Line and message of the problem furthest up since the last ``stop``.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    first: tuple[int, str] | None = None

    def add(self, kind: str, lines: Array, describe: Callable[[int], str]) -> None:
        """Note a problem at each of ``lines``; ``describe(i)`` words the i-th."""
        if not len(lines):
            return
        self.counts[kind] = self.counts.get(kind, 0) + len(lines)
        kept = self.examples.setdefault(kind, [])
        kept += [describe(i) for i in range(min(len(lines), EXAMPLES - len(kept)))]
        if self.first is None or lines[0] < self.first[0]:
            self.first = int(lines[0]), describe(0)

    def stop(self, strict: bool) -> None:
        """Raise the first problem where ``strict``; else forget which was first.

        Raises:
            DataError: There is one.
        """
        if strict and self.first is not None:
            raise DataError(self.first[1])
        self.first = None


@dataclass(frozen=True)
class Block:
    """Rows of one file.

    Attributes:
        values: Column name -> ``(n,)``: a pyarrow string array of an id, else numpy; names as
            codes, dates as days since 1970.
        lines: Line number of each row, ``(n,)`` int64.
        good: Are all values of the row as they should be? ``(n,)`` bool.
    """

    values: dict[str, Any]
    lines: Array
    good: Array


def where(path: Path, line: int, expected: str, got: str, remedy: str = "") -> str:
    """A message that names file and line."""
    return f"{path}, line {line}: expected {expected}, got {got}. {remedy}".rstrip()


class CsvFile:
    """One csv file, plain or gzip, read once from front to end.

    Args:
        path: ``.gz`` is unpacked on the way.
        columns: Those wanted; the file may hold them in any order, and others.
        advance: Called with the number of (unpacked) bytes just read.
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
        """SHA-256 of what was read so far, unpacked."""
        return self._digest.hexdigest()

    def blocks(self, size: int = BLOCK_BYTES) -> Iterator[Block]:
        """The rows, block by block; problems are added to ``problems`` on the way.

        Raises:
            DataError: The file cannot be read, is empty, or lacks a column.
        """
        rest, line = b"", 1
        for data in self._read(size):
            head, newline, tail = (rest + data).rpartition(b"\n")
            rest = tail
            if len(rest) > LINE_BYTES:
                got = f"{len(rest):,} without a newline"
                raise DataError(where(self.path, line, f"lines of up to {LINE_BYTES:,} bytes", got))
            if newline:
                lines = head.count(b"\n") + 1
                yield from self._block(head + b"\n", line)
                line += lines
        if not self._header:
            got = f"{rest[:80]!r} without a newline" if rest else "an empty file"
            raise DataError(where(self.path, 1, "a header line", got))
        if rest:
            message = where(
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
                where(
                    self.path, 1, f"the columns {', '.join(self.columns)}",
                    f"none named {', '.join(missing)} in {text[:200]!r}",
                    "Restore the official header.",
                )
            )  # fmt: skip
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise DataError(where(self.path, 1, "each column once", f"{twice} more than once"))
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
        """The block in its types; None where a row has no place in them."""
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
        good = np.ones(len(table), bool)
        values: dict[str, Any] = {}
        for name, column in self.columns.items():
            array = arrays[name]
            values[name], fine = _convert(column, array)
            self._note(column, array, fine | ~good, lines)
            good &= fine
        return Block(values, lines, good)

    def _diagnosed(self, data: bytes, line: int) -> Block:
        """The block parsed as text: each field is held against its column."""
        skipped: list[Any] = []  # the first few, which are shown
        numbers: list[int] = []

        def skip(row: Any) -> str:
            numbers.append(row.number - 1)  # numbered from 1 within the block
            if len(skipped) < EXAMPLES:
                skipped.append(row)
            return "skip"

        # Bytes that are no text would end the parse: they become a mark no column expects.
        data = data.decode("utf-8", "replace").encode()
        table = self._parse(data, dict.fromkeys(self.columns, pa.string()), skip)
        lost = np.array(numbers, np.int64)
        lines = line + np.delete(np.arange(len(table) + len(lost)), lost)
        self.problems.add(
            "fields",
            line + lost,
            lambda i: where(
                self.path, int(line + lost[i]), f"{len(self._header)} fields",
                f"{skipped[i].actual_columns} in {skipped[i].text[:120]!r}",
            ),
        )  # fmt: skip
        good = np.ones(len(table), bool)
        values: dict[str, Any] = {}
        for name, column in self.columns.items():
            text = pc.fill_null(_only_chunk(table[name]), "")
            sound = _sound(column, text)
            array = pc.if_else(sound, text, pa.scalar(None, pa.string()))
            array = array.dictionary_encode() if column.kind in ("name", "date") else array
            array = pc.fill_null(_cast(column, array), _filler(column))
            values[name], fine = _convert(column, array)
            fine &= np.asarray(sound)
            self._note(column, text, fine | ~good, lines)
            good &= fine
        return Block(values, lines, good)

    def _note(self, column: Column, shown: Any, fine: Array, lines: Array) -> None:
        """Add the rows that are not ``fine``; a row is noted for its first bad column alone."""
        if fine.all():
            return
        bad = (~fine).nonzero()[0]
        self.problems.add(
            f"bad {column.kind}",
            lines[bad],
            lambda i: where(
                self.path, int(lines[bad[i]]), f"{column.expected} in column {column.name}",
                repr(shown[int(bad[i])].as_py())[:90],
            ),
        )  # fmt: skip


def _only_chunk(column: Any) -> Any:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _are_ids(array: Any) -> Array:
    length = np.asarray(pc.binary_length(array))
    fine: Array = (length > 0) & (length <= ID_LENGTH)
    return fine


def _sound(column: Column, text: Any) -> Any:
    """Can each text be read as a value of the column's type? ``(n,)`` bool."""
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


def _filler(column: Column) -> Any:
    if column.kind == "flag":
        return False
    if column.kind in ("integer", "number"):
        return pa.scalar(0, column.arrow)
    return ""


def _convert(column: Column, array: Any) -> tuple[Any, Array]:
    """The values as :class:`Block` holds them, and which are in the column's range."""
    if column.kind == "id":
        return array, np.ones(len(array), bool)
    if column.kind in ("name", "date"):
        if column.kind == "date":
            known = [parse_date(text) for text in array.dictionary.to_pylist()]
        else:
            codes = {name: code for code, name in enumerate(column.names)}
            known = [codes.get(text) for text in array.dictionary.to_pylist()]
        index = np.asarray(array.indices)
        fine = np.array([code is not None for code in known], bool)[index]
        return np.array([code or 0 for code in known], np.int32)[index], fine
    values = array.to_numpy(zero_copy_only=False)
    if column.kind == "flag":
        return values, np.ones(len(values), bool)
    return values, (values >= column.low) & (values <= column.high)  # false for nan as well
