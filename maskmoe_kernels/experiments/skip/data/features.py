"""Sessions as tensors: the feature columns of both halves, and batches made from rows.

Half A is the first floor(n / 2) of the n tracks of a session, or of the slice that is drawn from
it; half B is the others. Each half is padded with zeros. The schema says which columns a half has;
those of the Music Streaming Sessions Dataset are, by group, listed below. B has its groups
position, popularity and music, computed in the same way from its own tracks.

=============  =====  =========================================================================
group          width  columns
=============  =====  =========================================================================
position         2    position / 10 - 1, session length / 10 - 1
context         13    one of 6 context types, premium, shuffle, sine and cosine of the hour of
                      day (of 24), sine and cosine of the weekday (of 7), weekend
interaction     29    skip_1, skip_2, skip_3, not_skipped, context_switch, no, short and long
                      pause before play, log(1 + seeks) forward and back, one of 9 start reasons
                      and "other", one of 8 end reasons and "other"
popularity       3    duration, release year, popularity; normalised, see :mod:`.tracks`
music           26    the other features of the track, normalised
=============  =====  =========================================================================

Flags are 0 or 1. Of B only the groups that exist there are read, and the label, the target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskmoe_kernels.experiments.skip.data.arrays import Array, Ints
from maskmoe_kernels.experiments.skip.data.columns import MSSD
from maskmoe_kernels.experiments.skip.data.ids import hash_ids, mix
from maskmoe_kernels.experiments.skip.schema.parse import parse_schema
from maskmoe_kernels.experiments.skip.schema.schema import PLACES, Feature, Group, Schema

#: Of the Music Streaming Sessions Dataset: tracks of a half, padding included; groups of both
#: halves and their widths; names of the columns; the column of half A that holds skip_2.
HALF = MSSD.sessions.half
FIRST_GROUPS, SECOND_GROUPS = MSSD.first_groups, MSSD.second_groups
FIRST_WIDTH, SECOND_WIDTH = sum(FIRST_GROUPS.values()), sum(SECOND_GROUPS.values())
FIRST_COLUMNS, SECOND_COLUMNS = MSSD.first_columns, MSSD.second_columns
SKIP_2 = MSSD.label_column
#: In training, one session in so many has an unknown user, so that its embedding is trained.
UNKNOWN = 16


@cache
def _read_columns(text: str) -> tuple[str, ...]:
    schema = parse_schema(text)
    names = dict.fromkeys(("session_id", "session_position", "track"))
    if schema.events.user:
        names["user"] = None
    used = (f for group in schema.groups for f in group.features)
    for feature in used:
        if feature.table in ("events", "past") and feature.source not in PLACES:
            names[feature.source] = None
    return (*names, *({schema.events.label} - names.keys()))


def read_columns(schema: Schema) -> tuple[str, ...]:
    """The columns of the shards that :class:`Rows` reads."""
    return _read_columns(schema.text)


#: Those of the Music Streaming Sessions Dataset.
READ = read_columns(MSSD)


@dataclass(eq=False)
class SessionBatch:
    """A batch of B sessions in two halves; ``first``, ``second`` and ``target`` are 0 at padding.

    A half has T steps, padding included: ``schema.sessions.half``, ten for MSSD.

    Attributes:
        first: Half A with the columns ``schema.first_columns``, ``(B, T, 73)`` float32 for MSSD.
        second: Half B with the columns ``schema.second_columns``, ``(B, T, 31)`` float32 for MSSD.
        target: The label of each track of half B, 0 or 1, ``(B, T)`` float32.
        first_padding: True where half A has no track, ``(B, T)`` bool.
        second_padding: True where half B has no track, ``(B, T)`` bool.
        session_ids: The ids, ``B`` of them.
        user: Row of each session's user in the table of embeddings, ``(B,)`` int64; 0 is a user
            without sessions in training. ``None``: the sessions have no users.
        offset: Tracks of the session before half A, ``(B,)`` int64; ``None``: 0.
    """

    first: Tensor
    second: Tensor
    target: Tensor
    first_padding: Tensor
    second_padding: Tensor
    session_ids: list[str]
    user: Tensor | None = None
    offset: Tensor | None = None

    def __len__(self) -> int:
        return len(self.session_ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SessionBatch:
        """The same batch on another device."""
        tensors = {n: t.to(device, non_blocking=non_blocking) for n, t in self._tensors().items()}
        return SessionBatch(**tensors, session_ids=self.session_ids)

    def pin_memory(self) -> SessionBatch:
        """The same batch in page-locked memory."""
        tensors = {name: tensor.pin_memory() for name, tensor in self._tensors().items()}
        return SessionBatch(**tensors, session_ids=self.session_ids)

    @classmethod
    def join(cls, parts: Sequence[SessionBatch]) -> SessionBatch:
        """One batch of all sessions of ``parts``, in order."""
        if len(parts) == 1:
            return parts[0]
        tensors = [part._tensors() for part in parts]
        joined = {name: torch.cat([t[name] for t in tensors]) for name in tensors[0]}
        return cls(**joined, session_ids=[name for part in parts for name in part.session_ids])

    def _tensors(self) -> dict[str, Tensor]:
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Rows:
    """Decoded rows of whole sessions.

    Attributes:
        columns: The columns of :func:`read_columns` without the session's id, each ``(rows,)``.
        starts: Row of each session's first track, ``(sessions,)`` int64.
        lengths: Tracks of each session, ``(sessions,)`` int64.
        session_ids: pyarrow strings, ``(sessions,)``.
        schema: The schema.
    """

    columns: Mapping[str, Array]
    starts: Array
    lengths: Array
    session_ids: Any
    schema: Schema

    @classmethod
    def decode(cls, table: Any, schema: Schema = MSSD) -> Rows:
        """Decode rows of shards.

        Args:
            table: pyarrow table with the columns of :func:`read_columns`.
            schema: The schema.
        """
        table = table.combine_chunks()
        columns = {}
        for name in read_columns(schema)[1:]:
            column = table[name]
            column = column.cast("int32") if str(column.type).startswith("date32") else column
            columns[name] = column.to_numpy()
        starts = (columns["session_position"] == 1).nonzero()[0]
        ids = table["session_id"].take(starts).combine_chunks()
        return cls(columns, starts, np.diff(starts, append=len(table)), ids, schema)


@dataclass(frozen=True)
class Draw:
    """The random choices of an epoch; they depend on the seed, the epoch and the session alone.

    Attributes:
        seed: The seed.
        epoch: The epoch, from 0.
        training: Whether some users become unknown.
    """

    seed: int = 0
    epoch: int = 0
    training: bool = False

    def offsets(self, digests: Array, most: Ints) -> Ints:
        """Where the slice of each session begins: from 0 to ``most``, all equally likely.

        Args:
            digests: Digests of the sessions' ids, ``(B,)`` uint64.
            most: ``(B,)``.
        """
        return (self._bits(digests, 1) % (most + 1).astype(np.uint64)).astype(np.int64)

    def unknown(self, digests: Array) -> Array:
        """Of which sessions the user is to be unknown, ``(B,)`` bool."""
        if not self.training:
            return np.zeros(len(digests), bool)
        chosen: Array = self._bits(digests, 2) % np.uint64(UNKNOWN) == 0
        return chosen

    def _bits(self, digests: Array, stream: int) -> Array:
        key = np.random.SeedSequence([self.seed, self.epoch, stream]).generate_state(1, np.uint64)
        bits: Array = mix(digests ^ key)
        return bits


def assemble(
    rows: Rows,
    which: Array,
    tracks: Array,
    users: tuple[Array, Array] | None = None,
    draw: Draw | None = None,
) -> SessionBatch:
    """Make a batch of some sessions, in the order of ``which``.

    Args:
        rows: The rows of these sessions and of others.
        which: Indices of sessions in ``rows``, ``(B,)``.
        tracks: Normalised features of all tracks, ``(tracks, columns)`` float32.
        users: Those of all users, ``(users, columns)`` float32, and whether they have sessions in
            training, ``(users,)`` bool.
        draw: The random choices; ``None``: the same in every epoch.
    """
    schema, draw = rows.schema, draw or Draw()
    ids = rows.session_ids.take(which)
    lengths = rows.lengths[which]
    starts, counts = rows.starts[which], lengths
    if schema.sessions.slice or users is not None:
        digests = hash_ids(ids)
    offsets = np.zeros(len(which), np.int64)
    if schema.sessions.slice:
        counts = np.minimum(lengths, schema.sessions.slice)
        offsets = draw.offsets(digests, lengths - counts)
        starts = starts + offsets
    first = _Half(rows, starts, counts // 2, lengths, 1)
    second = _Half(rows, starts + counts // 2, counts - counts // 2, lengths, 1 + counts // 2)
    tables = {"items": (tracks, "track")}
    user = None
    if users is not None:
        tables["users"] = (users[0], "user")
        row = rows.columns["user"][rows.starts[which]].astype(np.int64)
        known = users[1][row] & ~draw.unknown(digests)
        user = torch.from_numpy(np.where(known, row + 1, 0))
    return SessionBatch(
        first=first.fill(schema.of_half("A"), tables),
        second=second.fill(schema.of_half("B"), tables),
        target=second.padded(second.values(schema.events.label)[:, None]).squeeze(-1),
        first_padding=torch.from_numpy(~first.real),
        second_padding=torch.from_numpy(~second.real),
        session_ids=ids.to_pylist(),
        user=user,
        offset=torch.from_numpy(offsets) if schema.sessions.slice else None,
    )


class _Half:
    """The tracks of one half of B sessions, without padding.

    Args:
        rows: Rows of sessions.
        starts: First row of the half of each session, ``(B,)``.
        counts: Tracks of the half, ``(B,)``.
        lengths: Tracks of the session, ``(B,)``.
        place: Place of the half's first track in the slice, from 1; a number or ``(B,)``.

    Attributes:
        real: Whether there is a track, ``(B, T)`` bool.
        rows: Row of each track, ``(tracks,)``.
    """

    def __init__(self, rows: Rows, starts: Array, counts: Array, lengths: Array, place: Any):
        steps = np.arange(rows.schema.sessions.half)
        self.real = steps < counts[:, None]
        self.rows = (starts[:, None] + steps)[self.real]
        self._schema, self._columns = rows.schema, rows.columns
        self._lengths, self._counts, self._place = lengths, counts, place

    def values(self, name: str) -> Array:
        """A column, ``(tracks,)``."""
        if name == "session_length":
            return np.repeat(self._lengths, self._counts)
        if name == "place":
            steps = np.arange(self.real.shape[1])
            return np.broadcast_to(np.reshape(self._place, (-1, 1)) + steps, self.real.shape)[
                self.real
            ]
        return self._columns[name][self.rows]

    def fill(self, groups: Sequence[Group], tables: Mapping[str, tuple[Array, str]]) -> Tensor:
        """The columns of the groups, padded with zeros, ``(B, T, sum of widths)`` float32.

        Args:
            groups: The groups.
            tables: ``"items"``, ``"users"`` -> features of all rows, and the column of the row.
        """
        out = np.empty((len(self.rows), sum(len(g.columns) for g in groups)), np.float32)
        gathered: dict[str, Array] = {}
        start = 0
        for feature in (feature for group in groups for feature in group.features):
            part = out[:, start : start + len(feature.columns)]
            start += len(feature.columns)
            if feature.encoding == "embedding":
                part[:] = 0
            elif feature.table in ("events", "past"):
                _encode(feature, self.values(feature.source), part, self._schema)
            else:
                if feature.table not in gathered:
                    table, row = tables[feature.table]
                    gathered[feature.table] = table[self.values(row)]
                declared = getattr(self._schema, feature.table)
                values = gathered[feature.table][:, declared.places[feature.source]]
                part[:] = _scaled(feature, values)
        return self.padded(out)

    def padded(self, columns: Array) -> Tensor:
        """Columns ``(tracks, width)``, padded with zeros, ``(B, T, width)`` float32."""
        result = np.zeros((*self.real.shape, columns.shape[1]), np.float32)
        result[self.real] = columns
        return torch.from_numpy(result)


def _scaled(feature: Feature, values: Array) -> Array:
    if feature.log:
        values = np.log1p(values.astype(np.float32))
    if feature.divide != 1:
        values = values / np.float32(feature.divide)
    return values - feature.subtract if feature.subtract else values


def _encode(feature: Feature, values: Array, out: Array, schema: Schema) -> None:
    """Write the columns of a feature of an event.

    Args:
        feature: The feature.
        values: Its values as the shards hold them, ``(tracks,)``.
        out: ``(tracks, columns)``.
        schema: The schema.
    """
    match feature.encoding:
        case "value":
            out[:, 0] = _scaled(feature, values)
        case "one_hot":
            names = schema.events.by_name[feature.source].names
            out[:] = _one_hot(names, feature.names)[values]
        case "circle":
            out[:] = _circle(feature.period)[values % feature.period]
        case _:
            kind = schema.events.by_name[feature.source].kind
            days = values if kind == "date" else values // 86_400_000
            weekday = (days + 3) % 7  # Monday is 0; 1970-01-01 was a Thursday
            out[:] = (
                _circle(7)[weekday] if feature.encoding == "weekday" else (weekday >= 5)[:, None]
            )


@cache
def _circle(period: int) -> Array:
    """Sine and cosine of the angles 2 pi k / period, ``(period, 2)`` float32."""
    angle = 2 * np.pi * np.arange(period) / period
    return np.stack([np.sin(angle), np.cos(angle)], 1).astype(np.float32)


@cache
def _one_hot(names: Sequence[str], own: Sequence[str]) -> Array:
    """A one-hot row for each of ``names``; those not in ``own`` share a last column.

    Returns:
        ``(names, columns)`` float32.
    """
    place = [own.index(name) if name in own else len(own) for name in names]
    table: Array = np.eye(len(own) + (len(own) < len(names)), dtype=np.float32)[place]
    return table
