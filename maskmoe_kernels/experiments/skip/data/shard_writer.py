"""Writes the sessions of one log file to shards, one a split."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maskmoe_kernels.experiments.skip.data.arrays import UInt64s
from maskmoe_kernels.experiments.skip.data.ids import hash_ids
from maskmoe_kernels.experiments.skip.data.shard_format import (
    SPLITS,
    part_checksums,
    shard_schema,
    split_of,
)
from maskmoe_kernels.experiments.skip.schema.schema import Schema
from maskmoe_kernels.files import replacing


class ShardWriter:
    """A context that writes shards; they take their final names when it ends without an error.

    Args:
        shard: Split -> path of its shard. A shard without sessions is not written, and one that
            is there is removed.
        row_group: Sessions of a row group.
        schema: The schema.

    Attributes:
        row_groups: Split -> number of sessions of each row group.
        bytes: Split -> size of the shard, 0 without one; known after the context.
        parts: Split -> :func:`part_checksums` of the shard; known after the context.
    """

    def __init__(self, shard: Callable[[str], Path], row_group: int, schema: Schema):
        self.schema, self._columns = schema, shard_schema(schema)
        self.shard, self.row_group = shard, row_group
        self.row_groups: dict[str, list[int]] = {split: [] for split in SPLITS}
        self.bytes = dict.fromkeys(SPLITS, 0)
        self.parts: dict[str, list[list[int]]] = {split: [] for split in SPLITS}
        self._pending: dict[str, list[Any]] = {split: [] for split in SPLITS}
        self._writers: dict[str, Any] = {}
        self._files = ExitStack()

    def __enter__(self) -> ShardWriter:
        return self

    def add(self, table: Any, owners: UInt64s | None = None) -> None:
        """Take the rows of whole sessions, and write the row groups that are full.

        Args:
            table: pyarrow table with the columns of the shards.
            owners: Digest for each session of what decides its split; ``None``: of its id.
        """
        if not len(table):
            return
        starts = (table["session_position"].to_numpy() == 1).nonzero()[0]
        count = np.diff(starts, append=len(table))
        if owners is None:
            owners = hash_ids(table["session_id"].take(pa.array(starts)))
        split = split_of(owners)
        for i, name in enumerate(SPLITS):
            self._pending[name].append(table.filter(pa.array(np.repeat(split == i, count))))
            self._write(name, self.row_group)

    def _write(self, split: str, least: int) -> None:
        """Write pending sessions as row groups, as long as at least ``least`` are pending."""
        table = pa.concat_tables(self._pending[split])
        starts = (table["session_position"].to_numpy() == 1).nonzero()[0]
        bounds = np.append(starts, len(table))
        done = 0
        while len(starts) - done >= least:
            size = min(self.row_group, len(starts) - done)
            rows = table.slice(bounds[done], bounds[done + size] - bounds[done])
            self._writer(split).write_table(rows, row_group_size=len(rows))
            self.row_groups[split].append(size)
            done += size
        self._pending[split] = [table.slice(bounds[done])]

    def _writer(self, split: str) -> Any:
        if split not in self._writers:
            file = self._files.enter_context(replacing(self.shard(split)))
            self._writers[split] = pq.ParquetWriter(file, self._columns, compression="zstd")
            self._files.callback(self._writers[split].close)  # runs before the file is closed
        return self._writers[split]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._files.__exit__(kind, error, traceback)
            return
        with self._files:
            for split in SPLITS:
                if any(len(table) for table in self._pending[split]):
                    self._write(split, 1)
        for split in SPLITS:
            shard = self.shard(split)
            if split in self._writers:
                self.bytes[split], self.parts[split] = shard.stat().st_size, part_checksums(shard)
            else:
                shard.unlink(missing_ok=True)
