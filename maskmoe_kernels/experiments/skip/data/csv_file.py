"""Csv files read in blocks: typed columns with line numbers, and problems of invalid rows.

A block is some megabytes of whole lines. It is parsed with the columns' types first. Only if that
fails is it parsed again, as text, to read the other spellings and to find the invalid rows.
"""

from __future__ import annotations

import csv as python_csv
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.skip.data.arrays import Array
from maskmoe_kernels.experiments.skip.data.block import (
    EXAMPLES,
    Block,
    Problems,
    add_invalid,
    are_ids,
    arrow_type,
    convert_column,
    line_message,
    only_chunk,
    parsable_text,
)
from maskmoe_kernels.experiments.skip.data.packed import open_unpacked
from maskmoe_kernels.experiments.skip.data.quotes import badly_quoted, replace_lines
from maskmoe_kernels.experiments.skip.schema.column import FALSE, TRUE, Column

BLOCK_BYTES = 8 << 20
#: Longest line that is accepted, so that a file without newlines cannot fill the memory.
LINE_BYTES = 64 << 10


class CsvFile:
    """One csv file that is read once from start to end.

    Args:
        path: A file, plain or compressed; see :func:`open_unpacked`.
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
                remedy = "This is no csv file of sessions or tracks; name those files."
                raise DataError(line_message(self.path, line, expected, got, remedy))
            if newline:
                lines = head.count(b"\n") + 1
                yield from self._block(head + b"\n", line)
                line += lines
        if not self._header:
            got = f"{rest[:80]!r} without a newline" if rest else "an empty file"
            remedy = "The file is cut short; fetch it again."
            raise DataError(line_message(self.path, 1, "a header line", got, remedy))
        if rest:
            message = line_message(
                self.path, line, "a newline at the end of the last line", f"{rest[-60:]!r}",
                "The file is cut short; if it is whole, end it with a newline.",
            )  # fmt: skip
            self.problems.add("truncated", np.array([line]), lambda _: message)

    def _read(self, size: int) -> Iterator[bytes]:
        with open_unpacked(self.path) as read:
            while data := read(size):
                self._digest.update(data)
                self.advance(len(data))
                yield data

    def _block(self, data: bytes, line: int) -> Iterator[Block]:
        if not self._header:
            head, _, data = data.partition(b"\n")
            self._header = self._check_header(head.rstrip(b"\r").decode("utf-8", "replace"))
            line += 1
        if not data:
            return
        bad = badly_quoted(data) if b'"' in data else np.empty(0, np.int64)
        if len(bad):
            self._add_bad_quotes(data, bad, line)
            # With a field too many, the line is skipped as others of a wrong number are.
            data = replace_lines(data, bad, b"," * len(self._header))
        yield self._typed(data, line) or self._diagnosed(data, line, frozenset(bad.tolist()))

    def _check_header(self, text: str) -> list[str]:
        text = text.removeprefix("\ufeff")
        try:
            header = next(python_csv.reader([text]), [])
        except python_csv.Error:  # binary data, or a field of hundreds of kilobytes
            header = [text]
        missing = [name for name in self.columns if name not in header]
        if missing:
            remedy = "Restore the official header."
            if set(self.columns) <= set(re.split(r"[;\t|]", text.replace('"', ""))):
                remedy = "Separate the columns by commas."
            raise DataError(
                line_message(
                    self.path, 1, f"the columns {', '.join(self.columns)}",
                    f"none named {', '.join(missing)} in {text[:200]!r}", remedy,
                )
            )  # fmt: skip
        if twice := sorted({name for name in self.columns if header.count(name) > 1}):
            got = f"{twice} more than once"
            remedy = "Remove or rename one of the two."
            raise DataError(line_message(self.path, 1, "each column once", got, remedy))
        return header

    def _parse(self, data: bytes, types: dict[str, Any], handler: Any = None) -> Any:
        return csv.read_csv(
            pa.BufferReader(data),
            read_options=csv.ReadOptions(
                column_names=self._header, use_threads=False, block_size=len(data) + 1
            ),
            parse_options=csv.ParseOptions(
                quote_char='"' if b'"' in data else False,
                ignore_empty_lines=False,
                invalid_row_handler=handler,
            ),
            convert_options=csv.ConvertOptions(
                column_types=types, include_columns=list(self.columns), null_values=[""],
                true_values=list(TRUE), false_values=list(FALSE), strings_can_be_null=True,
            ),
        ).combine_chunks()  # fmt: skip

    def _typed(self, data: bytes, line: int) -> Block | None:
        """The block parsed with the columns' types; None if a value does not fit its type."""
        types = {name: arrow_type(column) for name, column in self.columns.items()}
        try:
            table = self._parse(data, types)
        except (pa.ArrowInvalid, pa.ArrowKeyError):
            return None
        arrays = {name: only_chunk(table[name]) for name in self.columns}
        for name, array in arrays.items():
            if array.null_count or (self.columns[name].kind == "id" and not are_ids(array).all()):
                return None
        lines = line + np.arange(len(table))
        valid = np.ones(len(table), bool)
        values: dict[str, Any] = {}
        for name, column in self.columns.items():
            array = arrays[name]
            values[name], in_range = convert_column(column, array)
            add_invalid(self.path, self.problems, column, array, valid & ~in_range, lines)
            valid &= in_range
        return Block(values, lines, valid)

    def _diagnosed(self, data: bytes, line: int, known: Set[int]) -> Block:
        """The block parsed as text, so that each invalid field is found and reported.

        Args:
            data: The block.
            line: The line number of its first line.
            known: Its lines, counted from 0, that are reported already.
        """
        skipped: list[Any] = []  # the first rows with a wrong number of fields, for the messages
        numbers: list[int] = []  # all of them, counted from 0 within the block

        def skip(row: Any) -> str:
            numbers.append(row.number - 1)  # pyarrow counts from 1
            if row.number - 1 not in known and len(skipped) < EXAMPLES:
                skipped.append(row)
            return "skip"

        # pyarrow stops at bytes that are not UTF-8, so U+FFFD takes their place.
        data = data.decode("utf-8", "replace").encode()
        table = self._parse(data, dict.fromkeys(self.columns, pa.string()), skip)
        missing = np.array(numbers, np.int64)
        lines = line + np.delete(np.arange(len(table) + len(missing)), missing)
        missing = missing[~np.isin(missing, list(known))]
        self.problems.add(
            "fields",
            line + missing,
            lambda i: line_message(
                self.path, int(line + missing[i]), f"{len(self._header)} fields",
                f"{skipped[i].actual_columns} in {skipped[i].text[:120]!r}",
                'Correct the line; a field with a comma in it must stand in double quotes (").',
            ),
        )  # fmt: skip
        valid = np.ones(len(table), bool)
        values: dict[str, Any] = {}
        for name, column in self.columns.items():
            text = pc.fill_null(only_chunk(table[name]), "")
            values[name], in_range = convert_column(column, *parsable_text(column, text))
            add_invalid(self.path, self.problems, column, text, valid & ~in_range, lines)
            valid &= in_range
        return Block(values, lines, valid)

    def _add_bad_quotes(self, data: bytes, bad: Array, line: int) -> None:
        """Report lines whose quotes cannot be read.

        Args:
            data: The block.
            bad: Its lines, counted from 0, ``(n,)``.
            line: The line number of its first line.
        """
        texts = data.split(b"\n")
        self.problems.add(
            "quotes",
            line + bad,
            lambda i: line_message(
                self.path, int(line + bad[i]),
                'double quotes (") around whole fields, closed on the same line',
                repr(texts[bad[i]][:120].decode("utf-8", "replace")),
                "Remove line breaks within fields, and write a quote in a quoted field twice.",
            ),
        )  # fmt: skip
