"""Parquet and arrow files read in batches, checked as the csv files are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.skip.data.arrays import Array
from maskmoe_kernels.experiments.skip.data.block import (
    LAST_TIME,
    Block,
    Problems,
    add_invalid,
    convert_column,
    only_chunk,
    parsable_text,
)
from maskmoe_kernels.experiments.skip.data.csv_file import CsvFile
from maskmoe_kernels.experiments.skip.data.packed import ROW_ENDINGS
from maskmoe_kernels.experiments.skip.schema.column import UNITS, Column

#: Rows of a block.
BATCH = 1 << 16


class ArrowFile:
    """A parquet or arrow file that is read once from start to end, like a :class:`CsvFile`.

    Args:
        path: The file; arrow files are those of ``pyarrow.ipc`` and feather.
        columns: The columns to read. The file may hold them in any order, and more.
        advance: Called with the number of bytes just read.
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
        self.digest = ""

    def blocks(self) -> Iterator[Block]:
        """Yield the rows in blocks, and add the problems of invalid rows to ``problems``.

        Raises:
            DataError: The file cannot be read, lacks a column, or has one of another type.
        """
        try:
            with self.path.open("rb") as file:
                self.digest = hashlib.file_digest(file, "sha256").hexdigest()
            row = 1
            for batch in self._batches():
                batch.validate(full=True)  # pyarrow trusts offsets and texts of a damaged file
                yield self._block(batch, row)
                row += len(batch)
            self.advance(self.path.stat().st_size)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{self.path}: expected a whole {self.path.suffix[1:]} file, got {error}. It may "
                "be cut short; fetch or write it again."
            ) from error

    def _batches(self) -> Iterator[Any]:
        names = list(self.columns)
        if self.path.suffix == ".parquet":
            with pq.ParquetFile(self.path) as file:
                self._check_names(file.schema_arrow)
                yield from file.iter_batches(BATCH, columns=names, use_threads=False)
            return
        with pa.memory_map(str(self.path)) as source:
            file = pa.ipc.open_file(source)
            self._check_names(file.schema)
            for i in range(file.num_record_batches):
                batch = file.get_batch(i).select(names)
                for start in range(0, len(batch), BATCH):
                    yield batch.slice(start, BATCH)

    def _check_names(self, found: Any) -> None:
        missing = [name for name in self.columns if name not in found.names]
        if missing:
            raise DataError(
                f"{self.path}: expected the columns {', '.join(self.columns)}, got none named "
                f"{', '.join(missing)} in {found.names}. Rename the columns, or correct the schema."
            )
        if twice := sorted({name for name in self.columns if found.names.count(name) > 1}):
            raise DataError(
                f"{self.path}: expected each column once, got {twice} more than once. Rename one."
            )

    def _block(self, batch: Any, row: int) -> Block:
        lines = row + np.arange(len(batch))
        valid = np.ones(len(batch), bool)
        values: dict[str, Any] = {}
        for name, column in self.columns.items():
            array = only_chunk(batch.column(name))
            try:
                values[name], in_range = _values(column, array)
            except (pa.ArrowException, TypeError) as error:
                raise DataError(
                    f"{self.path}: expected column {name} to hold {column.expected}, got the type "
                    f"{array.type} ({error}). Convert the column, or correct the schema."
                ) from error
            add_invalid(self.path, self.problems, column, array, valid & ~in_range, lines)
            valid &= in_range
        return Block(values, lines, valid)


def _values(column: Column, array: Any) -> tuple[Any, Array]:
    """The values of a column as :class:`Block` holds them, and which are valid."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind, typed = column.kind, array.type
    present = np.asarray(pc.is_valid(array))
    textual = pa.types.is_string(typed) or pa.types.is_large_string(typed)
    if textual or (kind == "id" and pa.types.is_integer(typed)):
        text = pc.fill_null(array.cast(pa.string()), "")
        values, valid = convert_column(column, *parsable_text(column, text))
        return values, valid & present
    if kind == "flag" and pa.types.is_boolean(typed):
        return pc.fill_null(array, False).to_numpy(zero_copy_only=False), present
    if kind in ("date", "time") and (pa.types.is_timestamp(typed) or pa.types.is_date(typed)):
        ms = pc.fill_null(
            array.cast(pa.timestamp("ms"), safe=False).cast(pa.int64()), -1
        ).to_numpy()
        valid = present & (ms >= 0) & (ms <= LAST_TIME)
        return (ms if kind == "time" else (ms // 86_400_000).astype(np.int32)), valid
    if not (pa.types.is_integer(typed) or pa.types.is_floating(typed)) or kind in ("id", "date"):
        raise TypeError("no conversion")
    number = pc.fill_null(array.cast(pa.float64(), safe=False), np.nan).to_numpy()
    if kind == "number":
        return number, (number >= column.low) & (number <= column.high)
    whole = np.where(number == np.floor(number), number, -1.0)
    if kind == "time":
        whole = whole * UNITS[column.unit]
        valid = (whole >= 0) & (whole <= LAST_TIME)
        return np.where(valid, whole, 0).astype(np.int64), valid
    low, high = (column.low, column.high) if kind == "integer" else (0, 1)
    if kind == "name":
        high = len(column.names) - 1 if column.numbered else -1
    valid = (number == np.floor(number)) & (number >= low) & (number <= high)
    values = np.where(valid, number, 0).astype(np.int32)
    return (values.astype(bool) if kind == "flag" else values), valid


def open_table(
    path: Path, columns: Sequence[Column], advance: Callable[[int], None] = lambda count: None
) -> CsvFile | ArrowFile:
    """A source file, by its name: parquet, arrow, or csv, plain or compressed."""
    kind = ArrowFile if path.suffix in ROW_ENDINGS else CsvFile
    return kind(path, columns, advance)
