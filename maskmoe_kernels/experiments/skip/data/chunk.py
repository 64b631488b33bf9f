"""Makes sessions and their features of the past from the events of some users."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from maskmoe_kernels.experiments.skip.data.arrays import Array, Ints
from maskmoe_kernels.experiments.skip.data.block import Problems, line_message
from maskmoe_kernels.experiments.skip.data.histories import Histories
from maskmoe_kernels.experiments.skip.data.ids import hash_ids
from maskmoe_kernels.experiments.skip.data.records import (
    LOGS_FOLDER,
    TRACKS_FOLDER,
    USERS_FOLDER,
    Step,
)
from maskmoe_kernels.experiments.skip.data.shard_format import (
    are_intact,
    shard_schema,
)
from maskmoe_kernels.experiments.skip.data.shard_writer import ShardWriter
from maskmoe_kernels.experiments.skip.data.tracks import DIGESTS, TRACKS
from maskmoe_kernels.experiments.skip.schema.schema import Past, Schema

#: The folder of the sorted tables in the folder of the shards, and the tables.
SORTED_FOLDER = "sorted"
EVENTS, ITEM_TIMES, ITEM_LABELS, ITEM_BOUNDS = (
    "events.parquet", "item_times.npy", "item_labels.npy", "item_bounds.npy",
)  # fmt: skip


@dataclass(frozen=True)
class Chunk(Step):
    """Rows of the sorted events that hold all events of some users.

    Attributes:
        number: Its place.
        begin: Its first row.
        end: The row after its last.
        out: Folder of the shards.
        schema: The schema.
        inputs: Digest of all that the sorted tables were made from.
        sources: The files of events, for messages.
        row_group: Sessions of a row group.
        strict: Stop at the first problem.
    """

    number: int
    begin: int
    end: int
    out: Path
    schema: Schema
    inputs: str
    sources: tuple[Path, ...]
    row_group: int
    strict: bool = False

    @property
    def name(self) -> str:
        """The name of its shards and of its record."""
        return f"part-{self.number:05}"

    @property
    def record(self) -> Path:
        """The record, which is written last."""
        return self.out / LOGS_FOLDER / f"{self.name}.json"

    def shard(self, split: str) -> Path:
        """The shard of one split. It is not written if it would hold no session."""
        return self.out / split / f"{self.name}.parquet"

    def made_from(self) -> dict[str, Any]:
        """All that the shards depend on."""
        rows = {"begin": self.begin, "end": self.end, "row_group": self.row_group}
        return rows | {"inputs": self.inputs, "schema": self.schema.data}

    def is_whole(self, record: Mapping[str, Any]) -> bool:
        """Whether the shards are as ``record`` says."""
        return are_intact(self.shard, record)


def convert_chunk(
    chunk: Chunk, advance: Callable[[int], None] = lambda count: None
) -> dict[str, Any]:
    """Make the sessions of a chunk, unless an earlier run did.

    Args:
        chunk: The chunk.
        advance: Called with the number of rows just read.
    Returns:
        The record, as it is written to ``chunk.record``.
    Raises:
        DataError: ``chunk.strict`` and there is a problem.
    """
    done = chunk.valid_record()
    if done is not None:
        return done
    made_from = chunk.start()
    problems = Problems()
    folder = chunk.out / SORTED_FOLDER
    table = _rows(folder / EVENTS, chunk.begin, chunk.end)
    events = _Events.decode(chunk, table, problems)
    problems.raise_first(chunk.strict)
    sessions = _Sessions.find(events, chunk.schema)
    past = {name: _value(one, chunk, events, sessions) for name, one in chunk.schema.past.items()}
    shard_table = _shard_table(chunk, events, sessions, past)
    owners = None
    if chunk.schema.sessions.split == "user":
        owners = events.digest[sessions.rows[sessions.starts]]
    with ShardWriter(chunk.shard, chunk.row_group, chunk.schema) as shards:
        shards.add(shard_table, owners)
    advance(chunk.end - chunk.begin)
    return chunk.finish(
        made_from,
        problems,
        digest=chunk.inputs,
        row_groups=shards.row_groups,
        bytes=shards.bytes,
        parts=shards.parts,
        sessions=len(sessions.starts),
        dropped=sessions.short + sessions.long,
        short=sessions.short,
        long=sessions.long,
    )


def _rows(path: Path, begin: int, end: int) -> Any:
    """Some rows of a parquet file."""
    parts = []
    with pq.ParquetFile(path) as file:
        start = 0
        for i in range(file.num_row_groups):
            count = file.metadata.row_group(i).num_rows
            low, high = max(begin - start, 0), min(end - start, count)
            if low < high:
                parts.append(file.read_row_group(i, use_threads=False).slice(low, high - low))
            start += count
        return pa.concat_tables(parts) if parts else file.schema_arrow.empty_table()


@dataclass(frozen=True)
class _Events:
    """The events of a chunk, by user and time; each array ``(events,)``.

    Attributes:
        table: The other columns, pyarrow.
        digest: Digest of the user's id.
        user: Row in the table of users.
        item: Row in the table of items.
        time: In ms.
        label: The label.
    """

    table: Any
    digest: Array
    user: Ints
    item: Ints
    time: Array
    label: Array

    @classmethod
    def decode(cls, chunk: Chunk, table: Any, problems: Problems) -> _Events:
        """Decode sorted rows; rows that repeat user, item and time of another are left out."""
        schema = chunk.schema.events
        user, item, time = (
            table[name].to_numpy() for name in ("user", "item", f"event_{schema.time}")
        )
        order = np.lexsort((np.arange(len(time)), item, time, user))
        same = np.zeros(len(time), bool)
        for column in (user, item, time):
            same[1:] = (
                column[order[1:]] == column[order[:-1]]
                if column is user
                else (same[1:] & (column[order[1:]] == column[order[:-1]]))
            )
        repeats = np.sort(order[same])
        if len(repeats):
            _add_repeats(chunk, table, repeats, problems)
            kept = np.ones(len(time), bool)
            kept[repeats] = False
            table = table.filter(pa.array(kept))
            user, item, time = user[kept], item[kept], time[kept]
        label = table[f"event_{schema.label}"].to_numpy()
        rows = [
            np.searchsorted(np.load(chunk.out / folder / DIGESTS, mmap_mode="r"), digests)
            for folder, digests in ((USERS_FOLDER, user), (TRACKS_FOLDER, item))
        ]
        return cls(table, user, rows[0], rows[1], time, label)


def _add_repeats(chunk: Chunk, table: Any, repeats: Ints, problems: Problems) -> None:
    source, line = table["source"].to_numpy(), table["line"].to_numpy()
    problems.add(
        "duplicate event",
        line[repeats],
        lambda i: line_message(
            chunk.sources[source[repeats[i]]], int(line[repeats[i]]),
            "each item of a user once at a time", "the same again", "The first counts.",
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class _Sessions:
    """The sessions of a chunk, by user and start.

    Attributes:
        rows: Row of each event in ``_Events``, by session and time, ``(events,)``.
        starts: Index in ``rows`` of the first event of each session, ``(sessions,)``.
        lengths: Events of each session, ``(sessions,)``.
        begin: Time of each session's first event, ``(sessions,)``.
        short: Number of sessions that were left out because they are too short.
        long: Number of those that are too long.
    """

    rows: Ints
    starts: Ints
    lengths: Ints
    begin: Array
    short: int = 0
    long: int = field(default=0)

    @classmethod
    def find(cls, events: _Events, schema: Schema) -> _Sessions:
        """Find the sessions, and leave out those of other lengths than the schema wants."""
        rules, count = schema.sessions, len(events.time)
        if rules.by == "inactivity":
            pause = np.diff(events.time, prepend=events.time[:1])
            new = (np.diff(events.user, prepend=-1) != 0) | (pause > rules.gap)
            rows, starts = np.arange(count), new.nonzero()[0]
        else:
            session = hash_ids(events.table["session"])
            _, code = np.unique(np.stack([events.digest, session]), axis=1, return_inverse=True)
            code = code.reshape(-1)
            first = np.full(int(code.max(initial=-1)) + 1, np.iinfo(np.int64).max)
            np.minimum.at(first, code, events.time)
            rows = np.lexsort((np.arange(count), code, first[code], events.user))
            starts = (np.diff(code[rows], prepend=-1) != 0).nonzero()[0]
        lengths = np.diff(starts, append=count)
        kept = (lengths >= rules.shortest) & (lengths <= rules.longest)
        rows = rows[np.repeat(kept, lengths)]
        short, long = int((lengths < rules.shortest).sum()), int((lengths > rules.longest).sum())
        lengths = lengths[kept]
        starts = np.cumsum(lengths) - lengths
        return cls(rows, starts, lengths, events.time[rows[starts]], short, long)


def _value(past: Past, chunk: Chunk, events: _Events, sessions: _Sessions) -> Array:
    """A feature of the past of every event that is in a session, ``(events,)``."""
    item, user = events.item[sessions.rows], events.user[sessions.rows]
    start = np.repeat(sessions.begin, sessions.lengths)
    if past.kind == "relation":
        return _related(past, chunk, user, item, start)
    if past.of == "item":
        folder = chunk.out / SORTED_FOLDER
        arrays = [
            np.load(folder / n, mmap_mode="r") for n in (ITEM_BOUNDS, ITEM_TIMES, ITEM_LABELS)
        ]
        return Histories(*arrays).value(past, item, start)
    of_user = past.of == "user"
    every = events.user if of_user else _pairs(events.user, events.item)
    codes, inverse = np.unique(every, return_inverse=True)
    histories = Histories.group(inverse.reshape(-1), events.time, events.label, len(codes))
    own = np.searchsorted(codes, user if of_user else _pairs(user, item))
    return histories.value(past, own, start)


def _pairs(user: Ints, item: Ints) -> Ints:
    """A number for each pair of rows in the tables of users and items."""
    return (user.astype(np.int64) << 32) | item


def _related(past: Past, chunk: Chunk, user: Ints, item: Ints, start: Array) -> Array:
    """Whether each pair is in the relation since before the session, ``(events,)`` float64."""
    path = chunk.out / SORTED_FOLDER / f"{past.relation}.parquet"
    if not len(user) or not path.is_file():  # without pairs, there is no table
        return np.zeros(len(user))
    digests = np.load(chunk.out / USERS_FOLDER / DIGESTS, mmap_mode="r")
    low, high = digests[user.min()], digests[user.max()]
    table = pq.read_table(
        path, filters=(pc.field("user") >= low) & (pc.field("user") <= high), use_threads=False
    )
    users, items = table["user"].to_numpy(), table["item"].to_numpy()
    tracks = np.load(chunk.out / TRACKS_FOLDER / DIGESTS, mmap_mode="r")
    rows = [np.searchsorted(found, own) for found, own in ((digests, users), (tracks, items))]
    known = [
        found[np.minimum(at, len(found) - 1)] == own
        for found, at, own in zip((digests, tracks), rows, (users, items), strict=True)
    ]
    both = known[0] & known[1]
    pairs, since = _pairs(rows[0][both], rows[1][both]), table["since"].to_numpy()[both]
    order = np.lexsort((since, pairs))
    pairs, since = pairs[order], since[order]
    own = _pairs(user, item)
    at = np.searchsorted(pairs, own)  # the earliest of the pair
    if not len(pairs):
        return np.zeros(len(own))
    place = np.minimum(at, len(pairs) - 1)
    always = not chunk.schema.relations[past.relation].since
    related: Array = (pairs[place] == own) & (always | (since[place] < start))
    return related.astype(np.float64)


def _shard_table(
    chunk: Chunk, events: _Events, sessions: _Sessions, past: Mapping[str, Array]
) -> Any:
    """The rows of the sessions in the columns of the shards."""
    rows, lengths = sessions.rows, sessions.lengths
    taken = events.table.take(pa.array(rows))
    values: dict[str, Any] = {
        "session_id": _session_ids(chunk, events, sessions),
        "session_position": np.arange(len(rows)) - np.repeat(sessions.starts, lengths) + 1,
        "session_length": np.repeat(lengths, lengths),
        "user": events.user[rows],
        "track": events.item[rows],
        **past,
    }
    columns = {}
    for entry in shard_schema(chunk.schema):
        value = values.get(entry.name)
        if value is None:
            value = taken[f"event_{entry.name}"].to_numpy()
        if isinstance(value, np.ndarray):
            kind = np.int32 if pa.types.is_date(entry.type) else entry.type.to_pandas_dtype()
            value = pa.array(value.astype(kind)).cast(entry.type)
        columns[entry.name] = value
    return pa.table(columns, schema=shard_schema(chunk.schema))


def _session_ids(chunk: Chunk, events: _Events, sessions: _Sessions) -> Any:
    """The id of each event's session: the user's, and the session's or the time of its start."""
    first = sessions.rows[sessions.starts]
    ids = pq.read_table(chunk.out / USERS_FOLDER / TRACKS).column(0).combine_chunks()
    users = ids.take(pa.array(events.user[first]))
    if chunk.schema.sessions.column:
        own = events.table["session"].combine_chunks().take(pa.array(first))
    else:
        own = pa.array(np.datetime_as_string(sessions.begin.astype("datetime64[ms]"), unit="ms"))
    names = partial(pc.binary_join_element_wise, users, own)("/")
    return names.take(pa.array(np.repeat(np.arange(len(first)), sessions.lengths)))
