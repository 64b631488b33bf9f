"""From one ``log_*.csv`` to parquet shards, whole sessions only, one shard for each split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maskmoe_kernels.experiments.shared.files import checksum, replacing
from maskmoe_kernels.experiments.shared.report import sealed, write_json
from maskmoe_kernels.experiments.skip.data.mssd_columns import (
    LOG_COLUMNS,
    LONGEST,
    SHORTEST,
    UInt64s,
    hash_ids,
    mix,
)
from maskmoe_kernels.experiments.skip.data.mssd_csv import Array, Block, CsvFile, where
from maskmoe_kernels.experiments.skip.data.mssd_tracks import (
    FORMAT,
    fingerprint,
    is_whole,
    mark_of,
    read_record,
    save_array,
)

#: 80, 10 and 10 % of the sessions, by the digest of their id: resharding moves none.
SPLITS = ("train", "valid", "test")
#: Sessions of a row group, the unit of reading.
ROW_GROUP = 2048

_SMALL = {"session_position": pa.uint8(), "session_length": pa.uint8(), "hour_of_day": pa.uint8()}
_TYPES = {"flag": pa.bool_(), "name": pa.uint8(), "date": pa.date32(), "id": pa.string()}


def _shard_type(name: str, kind: str, high: float) -> Any:
    if kind != "integer":
        return _TYPES[kind]
    return _SMALL.get(name) or (pa.bool_() if high == 1 else pa.uint16())


#: Official names and order; ``track`` is the row in the table of tracks.
SCHEMA = pa.schema(
    [
        ("track", pa.int32())
        if column.name == "track_id_clean"
        else (column.name, _shard_type(column.name, column.kind, column.high))
        for column in LOG_COLUMNS
    ]
)


def split_of(digest: UInt64s) -> Array:
    """Index into ``SPLITS`` of each session, from the digest of its id."""
    tenth = mix(digest ^ np.uint64(0x5348415244)) % np.uint64(10)
    return np.maximum(tenth.astype(np.int64) - 7, 0)


@dataclass(frozen=True)
class Log:
    """One log file to convert.

    Attributes:
        source: ``log_*.csv``, or ``.csv.gz``.
        out: Folder of the shards.
        tracks: Digest of the table of tracks in it.
        row_group: Sessions of a row group.
        strict: Stop at the first problem.
        excluded: Digests of sessions that other files hold already.
        because: Those files: name -> digest.
    """

    source: Path
    out: Path
    tracks: str
    row_group: int = ROW_GROUP
    strict: bool = False
    excluded: UInt64s = field(default_factory=lambda: np.empty(0, np.uint64))
    because: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The file's name without its endings, which the shards take over."""
        return self.source.name.removesuffix(".gz").removesuffix(".csv")

    @property
    def record(self) -> Path:
        """Written last: with it the file is done."""
        return self.out / "logs" / f"{self.name}.json"

    @property
    def digests(self) -> Path:
        """Digest of each session's id, ``(sessions,)`` uint64."""
        return self.out / "logs" / f"{self.name}.npy"

    def shard(self, split: str) -> Path:
        """The shard of one split; absent where it would hold no session."""
        return self.out / split / f"{self.name}.parquet"

    def done(self) -> dict[str, Any] | None:
        """The record of an earlier run that still holds; None where work is to do."""
        record = read_record(self.record)
        if record is None or record["source"] != fingerprint(self.source):
            return None
        if record["tracks"] != self.tracks or record["row_group"] != self.row_group:
            return None
        if self.strict and record["problems"]["counts"]:
            return None
        for split in SPLITS:
            path, parts = self.shard(split), record["parts"][split]
            if (path.stat().st_size if path.is_file() else 0) != record["bytes"][split]:
                return None
            if not all(is_part_whole(path, parts, i) for i in range(len(parts))):
                return None
        return record if is_whole(self.digests, record["digests"]) else None


def convert(log: Log, advance: Callable[[int], None] = lambda count: None) -> dict[str, Any]:
    """Convert one log file and return its record; rows and sessions with a problem are left out.

    Raises:
        DataError: The file cannot be read or lacks a column, or ``strict`` and something is wrong.
    """
    mark = fingerprint(log.source)
    log.record.unlink(missing_ok=True)
    known = np.load(log.out / "tracks" / "hash.npy", mmap_mode="r")
    file = CsvFile(log.source, LOG_COLUMNS, advance)
    sessions = _Sessions(file, log)
    with _Shards(log) as shards:
        for block in file.blocks():
            # Before the sessions: a bad row is why its session looks damaged too.
            file.problems.stop(log.strict)
            shards.add(sessions.take(_table(block, known)))
            file.problems.stop(log.strict)
        file.problems.stop(log.strict)
        shards.add(sessions.finish())
        file.problems.stop(log.strict)
    digests = np.fromiter(sessions.lines, np.uint64, len(sessions.lines))
    save_array(log.digests, digests)
    record = {
        "format": FORMAT,
        "source": mark,
        "digest": file.digest,
        "tracks": log.tracks,
        "row_group": log.row_group,
        "because": dict(log.because),
        "row_groups": shards.row_groups,
        "bytes": shards.bytes,
        "parts": shards.parts,
        "digests": mark_of(log.digests),
        "sessions": len(digests),
        "dropped": sessions.dropped,
        "problems": {"counts": file.problems.counts, "examples": file.problems.examples},
    }
    write_json(log.record, sealed(record))
    return record


def parts_of(path: Path) -> list[list[int]]:
    """Where each part of a shard ends and the CRC-32 of its bytes: its row groups, then the rest.

    With them what is read is verified, and no more than that.
    """
    about = pq.read_metadata(path)
    columns = [about.row_group(i).column(0) for i in range(about.num_row_groups)]
    begin = [c.dictionary_page_offset or c.data_page_offset for c in columns]
    # What follows the last group's pages is the index of the file.
    index = path.stat().st_size - about.serialized_size - 8
    ends = [*begin[1:], index, path.stat().st_size]
    starts = [0, *ends[:-1]]
    return [[end, checksum(path, start, end)] for start, end in zip(starts, ends, strict=True)]


def is_part_whole(path: Path, parts: Sequence[Sequence[int]], i: int) -> bool:
    """Has the i-th of :func:`parts_of` the checksum that it had?"""
    end, known = parts[i]
    return checksum(path, parts[i - 1][0] if i else 0, end) == known


def _table(block: Block, known: UInt64s) -> Any:
    """The rows in the schema's types, and ``line``, ``good``, ``digest``, ``track_id``."""
    good = block.good
    tracks = block.values["track_id_clean"]
    digest = hash_ids(tracks)
    place = np.minimum(np.searchsorted(known, digest), len(known) - 1)
    values = dict(block.values) | {"track": np.where(known[place] == digest, place, -1)}
    columns = {}
    for entry in SCHEMA:
        value = values[entry.name]
        if isinstance(value, np.ndarray):
            if pa.types.is_boolean(entry.type):
                value = value.astype(bool)
            # A bad row may hold what the type cannot: it is never written.
            value = np.where(good, value, 0) if value.dtype != bool else value
            kind = np.int32 if pa.types.is_date(entry.type) else entry.type.to_pandas_dtype()
            if entry.name in ("session_position", "session_length"):
                value = np.minimum(value, 255)
            value = pa.array(value.astype(kind)).cast(entry.type)
        columns[entry.name] = value
    extra = {
        "line": pa.array(block.lines),
        "good": pa.array(good),
        "digest": pa.array(hash_ids(block.values["session_id"])),
        "track_id": tracks,
    }
    return pa.table(columns | extra)


class _Sessions:
    """Joins rows to sessions over the borders of blocks, and lets whole ones pass."""

    def __init__(self, file: CsvFile, log: Log):
        self.file = file
        self.lines: dict[int, int] = {}  # digest of each session that passed -> its line
        self.dropped = 0
        self._excluded = frozenset(log.excluded.tolist())
        self._others = ", ".join(log.because)
        self._rest: Any = None

    def take(self, table: Any) -> Any:
        """The rows of whole sessions; the last one waits, for it may go on in the next block."""
        if self._rest is not None:
            table = pa.concat_tables([self._rest, table]).combine_chunks()
        starts = _starts(table)
        # No session is as long as this: it is cut here, and what follows is reported too.
        cut = int(starts[-1]) if len(table) - starts[-1] <= 4 * LONGEST else len(table)
        self._rest = table.slice(cut)
        return self._check(table.slice(0, cut), last=False)

    def finish(self) -> Any:
        """The rows of the last session, if it is whole."""
        if self._rest is None:
            return SCHEMA.empty_table()
        return self._check(self._rest, last=True)

    def _check(self, table: Any, last: bool) -> Any:
        if not len(table):
            return SCHEMA.empty_table()
        self._note_unknown(table)
        runs = _Runs(table)
        # Problems of rows are noted already: their sessions go without another word.
        fine = runs.all(runs.column["good"] & (runs.column["track"] >= 0))
        for kind, holds, expected, got in runs.rules(last):
            self._note(kind, runs, fine & ~holds, expected, got)
            fine &= holds
        earlier = self._earlier(runs, fine)
        again = np.isin(np.arange(len(fine)), list(earlier))
        self._note(
            "duplicate session", runs, again, lambda s: "each session once, session", earlier.get
        )
        fine &= ~again
        self.dropped += int((~fine).sum())
        return table.select(SCHEMA.names).filter(pa.array(np.repeat(fine, runs.count)))

    def _note(
        self,
        kind: str,
        runs: _Runs,
        bad: Array,
        expected: Callable[[int], str],
        got: Callable[[int], object],
    ) -> None:
        which = bad.nonzero()[0].tolist()
        lines = runs.column["line"][runs.starts]

        def describe(i: int) -> str:
            s = which[i]
            name = runs.table["session_id"][int(runs.starts[s])]
            words = f"{expected(s)} {name}", str(got(s)), "The session is left out."
            return where(self.file.path, int(lines[s]), *words)

        self.file.problems.add(kind, lines[which], describe)

    def _earlier(self, runs: _Runs, fine: Array) -> dict[int, str]:
        """Where each session that is here again was before; the others are remembered."""
        digests = runs.column["digest"][runs.starts].tolist()
        lines = runs.column["line"][runs.starts].tolist()
        found: dict[int, str] = {}
        for s in fine.nonzero()[0].tolist():
            if digests[s] in self.lines:
                found[s] = f"the one of line {self.lines[digests[s]]} again"
            elif digests[s] in self._excluded:
                found[s] = f"one that {self._others} holds too"
            else:
                self.lines[digests[s]] = lines[s]
        return found

    def _note_unknown(self, table: Any) -> None:
        unknown = table["good"].to_numpy() & (table["track"].to_numpy() < 0)
        bad, lines = unknown.nonzero()[0], table["line"].to_numpy()
        self.file.problems.add(
            "unknown track",
            lines[bad],
            lambda i: where(
                self.file.path, int(lines[bad[i]]),
                "a track of the tf_*.csv files in column track_id_clean",
                repr(table["track_id"][int(bad[i])].as_py()), "Add the file that holds it.",
            ),
        )  # fmt: skip


class _Runs:
    """Runs of rows with one session id, and what a session has to be."""

    def __init__(self, table: Any):
        self.table = table
        self.starts = _starts(table)
        self.count = np.diff(self.starts, append=len(table))
        names = ("line", "good", "digest", "track", "session_position", "session_length")
        self.column = {name: table[name].to_numpy() for name in names}

    def all(self, rows: Array) -> Array:
        """Does it hold for every row of a run? ``(runs,)`` bool."""
        held: Array = np.logical_and.reduceat(rows, self.starts)
        return held

    def rules(
        self, last: bool
    ) -> Iterator[tuple[str, Array, Callable[[int], str], Callable[[int], object]]]:
        """Kind of problem, where there is none, what was expected and what came.

        Args:
            last: Does the file end here?
        """
        count, length = self.count, self.column["session_length"]
        position = self.column["session_position"]
        declared = length[self.starts].astype(np.int64)
        row = np.arange(len(position)) - np.repeat(self.starts, count)

        def of(s: int) -> slice:
            return slice(self.starts[s], self.starts[s] + min(count[s], LONGEST + 5))

        def rows(s: int) -> str:
            return f"{declared[s]} rows (session_length) of session"

        yield (
            "lengths disagree", self.all(length == np.repeat(declared, count)),
            lambda s: "one session_length for session", lambda s: np.unique(length[of(s)]).tolist(),
        )  # fmt: skip
        if last:
            yield (
                "cut session", count >= declared, rows,
                lambda s: f"{count[s]} at the end of the file, which is cut short",
            )  # fmt: skip
        yield (
            "positions", self.all(position == row + 1),
            lambda s: f"positions 1 to {declared[s]}, each once and in order, of session",
            lambda s: position[of(s)].tolist(),
        )  # fmt: skip
        yield "length", count == declared, rows, lambda s: count[s]
        yield (
            "session size", (count >= SHORTEST) & (count <= LONGEST),
            lambda s: f"{SHORTEST} to {LONGEST} tracks in session", lambda s: count[s],
        )  # fmt: skip


def _starts(table: Any) -> Array:
    digest = table["digest"].to_numpy()
    return np.concatenate([[0], (digest[1:] != digest[:-1]).nonzero()[0] + 1])


class _Shards:
    """The three shards of one log file; each appears in its place when all are complete."""

    def __init__(self, log: Log):
        self.log = log
        self.row_groups: dict[str, list[int]] = {split: [] for split in SPLITS}
        self.bytes = dict.fromkeys(SPLITS, 0)
        self.parts: dict[str, list[list[int]]] = {split: [] for split in SPLITS}
        self._pending: dict[str, list[Any]] = {split: [] for split in SPLITS}
        self._writers: dict[str, Any] = {}
        self._files = ExitStack()

    def __enter__(self) -> _Shards:
        return self

    def add(self, table: Any) -> None:
        """Take rows of whole sessions; write the row groups that are full."""
        if not len(table):
            return
        starts = (table["session_position"].to_numpy() == 1).nonzero()[0]
        count = np.diff(starts, append=len(table))
        split = split_of(hash_ids(table["session_id"].take(pa.array(starts))))
        for i, name in enumerate(SPLITS):
            self._pending[name].append(table.filter(pa.array(np.repeat(split == i, count))))
            self._write(name, self.log.row_group)

    def _write(self, split: str, least: int) -> None:
        table = pa.concat_tables(self._pending[split])
        starts = (table["session_position"].to_numpy() == 1).nonzero()[0]
        bounds = np.append(starts, len(table))
        done = 0
        while len(starts) - done >= least:
            size = min(self.log.row_group, len(starts) - done)
            rows = table.slice(bounds[done], bounds[done + size] - bounds[done])
            self._writer(split).write_table(rows, row_group_size=len(rows))
            self.row_groups[split].append(size)
            done += size
        self._pending[split] = [table.slice(bounds[done])]

    def _writer(self, split: str) -> Any:
        if split not in self._writers:
            file = self._files.enter_context(replacing(self.log.shard(split)))
            self._writers[split] = pq.ParquetWriter(file, SCHEMA, compression="zstd")
            self._files.callback(self._writers[split].close)  # before the file
        return self._writers[split]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._files.__exit__(kind, error, at)
            return
        with self._files:
            for split in SPLITS:
                if any(len(table) for table in self._pending[split]):
                    self._write(split, 1)
        for split in SPLITS:
            shard = self.log.shard(split)
            if split in self._writers:
                self.bytes[split], self.parts[split] = shard.stat().st_size, parts_of(shard)
            else:
                shard.unlink(missing_ok=True)
