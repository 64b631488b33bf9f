"""Converts one ``log_*.csv`` to shards of whole, valid sessions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from maskmoe_kernels.experiments.skip.data.arrays import UInt64s
from maskmoe_kernels.experiments.skip.data.arrow_file import open_table
from maskmoe_kernels.experiments.skip.data.columns import MSSD
from maskmoe_kernels.experiments.skip.data.packed import stem
from maskmoe_kernels.experiments.skip.data.records import (
    LOGS_FOLDER,
    TRACKS_FOLDER,
    Step,
    fingerprint,
    is_intact,
    save_array,
    size_and_checksum,
)
from maskmoe_kernels.experiments.skip.data.session_rows import SessionRows, block_table
from maskmoe_kernels.experiments.skip.data.shard_format import ROW_GROUP, are_intact
from maskmoe_kernels.experiments.skip.data.shard_writer import ShardWriter
from maskmoe_kernels.experiments.skip.data.tracks import DIGESTS
from maskmoe_kernels.experiments.skip.schema.schema import Schema


@dataclass(frozen=True)
class LogFile(Step):
    """A log file to convert, and where its results go.

    Attributes:
        source: ``log_*.csv``, plain or compressed.
        out: Folder of the shards.
        tracks: Digest of the table of tracks in ``out``.
        row_group: Sessions of a row group.
        strict: Stop at the first problem.
        excluded: Digests of sessions to drop because earlier log files hold them.
        earlier: Those log files: name -> digest of its content.
        schema: The schema.
    """

    source: Path
    out: Path
    tracks: str
    row_group: int = ROW_GROUP
    strict: bool = False
    excluded: UInt64s = field(default_factory=lambda: np.empty(0, np.uint64))
    earlier: Mapping[str, str] = field(default_factory=dict)
    schema: Schema = MSSD

    @property
    def name(self) -> str:
        """The file's name without its endings; the shards have the same name."""
        return stem(self.source)

    @property
    def record(self) -> Path:
        """The record of the conversion, which is written last."""
        return self.out / LOGS_FOLDER / f"{self.name}.json"

    @property
    def digests(self) -> Path:
        """An array with the digest of each session's id, ``(sessions,)`` uint64."""
        return self.out / LOGS_FOLDER / f"{self.name}.npy"

    def shard(self, split: str) -> Path:
        """The shard of one split. It is not written if it would hold no session."""
        return self.out / split / f"{self.name}.parquet"

    def made_from(self) -> dict[str, Any]:
        """All that the shards depend on, but for other log files."""
        own = {"source": fingerprint(self.source), "schema": self.schema.data}
        return own | {"tracks": self.tracks, "row_group": self.row_group}

    def is_whole(self, record: Mapping[str, Any]) -> bool:
        """Whether the shards and the digests are as ``record`` says."""
        return are_intact(self.shard, record) and is_intact(self.digests, record["digests"])


def convert(log: LogFile, advance: Callable[[int], None] = lambda count: None) -> dict[str, Any]:
    """Convert one log file; rows with a problem are dropped together with their sessions.

    Args:
        log: What to convert.
        advance: Called with the number of bytes just read.
    Returns:
        The record, as it is written to ``log.record``.
    Raises:
        DataError: The file cannot be read or lacks a column, or ``log.strict`` and there is a
            problem.
    """
    made_from = log.start()
    tracks = np.load(log.out / TRACKS_FOLDER / DIGESTS, mmap_mode="r")
    file = open_table(log.source, log.schema.events.columns, advance)
    sessions = SessionRows(file.path, file.problems, log.excluded, log.earlier, log.schema)
    with ShardWriter(log.shard, log.row_group, log.schema) as shards:
        for block in file.blocks():
            # Raise before sessions are checked: an invalid row also makes its session incomplete.
            file.problems.raise_first(log.strict)
            shards.add(sessions.add(block_table(block, tracks, log.schema)))
            file.problems.raise_first(log.strict)
        file.problems.raise_first(log.strict)
        shards.add(sessions.finish())
        file.problems.raise_first(log.strict)
    digests = np.fromiter(sessions.lines, np.uint64, len(sessions.lines))
    save_array(log.digests, digests)
    return log.finish(
        made_from,
        file.problems,
        digest=file.digest,
        because=dict(log.earlier),
        row_groups=shards.row_groups,
        bytes=shards.bytes,
        parts=shards.parts,
        digests=size_and_checksum(log.digests),
        sessions=len(digests),
        dropped=sessions.dropped,
    )
