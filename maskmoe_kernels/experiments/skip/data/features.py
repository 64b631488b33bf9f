"""Sessions as tensors: the feature columns of both halves, and batches made from rows.

Half A is the first floor(n / 2) of a session's n tracks, half B the others. Each half is padded
with zeros to ten tracks. The columns of A, by group, are listed below. B has the groups position,
popularity and music, computed in the same way from its own tracks.

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

Flags are 0 or 1. The context and the interactions of B are not read, except skip_2, the target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskmoe_kernels.experiments.skip.data.arrays import Array
from maskmoe_kernels.experiments.skip.data.columns import (
    CONTEXT_TYPES,
    END_NAMES,
    END_REASONS,
    HISTORY,
    LONGEST,
    POPULARITY,
    START_NAMES,
    START_REASONS,
    TRACK_FEATURES,
)

#: Tracks of a half, including padding.
HALF = LONGEST // 2
_FLAGS = (
    "skip_1", "skip_2", "skip_3", "not_skipped", "context_switch", "no_pause_before_play",
    "short_pause_before_play", "long_pause_before_play",
)  # fmt: skip
_SEEKS = (HISTORY + "n_seekfwd", HISTORY + "n_seekback")

#: Name of each column, by group.
COLUMNS: dict[str, tuple[str, ...]] = {
    "position": ("position", "session_length"),
    "context": (
        *CONTEXT_TYPES, "premium", "shuffle", "hour_sin", "hour_cos", "weekday_sin", "weekday_cos",
        "weekend",
    ),
    "interaction": (
        *_FLAGS, "seeks_forward", "seeks_back",
        *(f"start_{name}" for name in (*START_REASONS, "other")),
        *(f"end_{name}" for name in (*END_REASONS, "other")),
    ),
    "popularity": POPULARITY,
    "music": tuple(name for name in TRACK_FEATURES if name not in POPULARITY),
}  # fmt: skip
#: Groups of half A and their widths, in the order of the columns.
FIRST_GROUPS: dict[str, int] = {name: len(columns) for name, columns in COLUMNS.items()}
#: Groups of half B and their widths.
SECOND_GROUPS: dict[str, int] = {
    name: width for name, width in FIRST_GROUPS.items() if name not in ("context", "interaction")
}
FIRST_WIDTH, SECOND_WIDTH = sum(FIRST_GROUPS.values()), sum(SECOND_GROUPS.values())
#: Column names in tensor order.
FIRST_COLUMNS: tuple[str, ...] = tuple(name for group in FIRST_GROUPS for name in COLUMNS[group])
SECOND_COLUMNS: tuple[str, ...] = tuple(name for group in SECOND_GROUPS for name in COLUMNS[group])
#: The column of half A that holds skip_2, which the baselines use.
SKIP_2 = FIRST_COLUMNS.index("skip_2")

#: The columns of the shards that :class:`Rows` reads.
READ = (
    "session_id", "session_position", "track", *_FLAGS, *_SEEKS, HISTORY + "is_shuffle",
    "hour_of_day", "date", "premium", "context_type", HISTORY + "reason_start",
    HISTORY + "reason_end",
)  # fmt: skip


@dataclass(eq=False)
class SessionBatch:
    """A batch of B sessions in two halves; ``first``, ``second`` and ``target`` are 0 at padding.

    Attributes:
        first: Half A with the columns ``FIRST_COLUMNS``, ``(B, 10, 73)`` float32.
        second: Half B with the columns ``SECOND_COLUMNS``, ``(B, 10, 31)`` float32.
        target: skip_2 of each track of half B, 0 or 1, ``(B, 10)`` float32.
        first_padding: True where half A has no track, ``(B, 10)`` bool.
        second_padding: True where half B has no track, ``(B, 10)`` bool.
        session_ids: The official ids, ``B`` of them.
    """

    first: Tensor
    second: Tensor
    target: Tensor
    first_padding: Tensor
    second_padding: Tensor
    session_ids: list[str]

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
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "session_ids"}


@dataclass(frozen=True)
class Rows:
    """Decoded rows of whole sessions.

    Attributes:
        columns: The columns ``READ`` without the session's id, each ``(rows,)``.
        starts: Row of each session's first track, ``(sessions,)`` int64.
        lengths: Tracks of each session, ``(sessions,)`` int64.
        session_ids: pyarrow strings, ``(sessions,)``.
    """

    columns: Mapping[str, Array]
    starts: Array
    lengths: Array
    session_ids: Any

    @classmethod
    def decode(cls, table: Any) -> Rows:
        """Decode rows of shards.

        Args:
            table: pyarrow table with the columns ``READ``.
        """
        table = table.combine_chunks()
        columns = {}
        for name in READ[1:]:
            column = table[name]
            column = column.cast("int32") if name == "date" else column
            columns[name] = column.to_numpy()
        starts = (columns["session_position"] == 1).nonzero()[0]
        ids = table["session_id"].take(starts).combine_chunks()
        return cls(columns, starts, np.diff(starts, append=len(table)), ids)


def assemble(rows: Rows, which: Array, tracks: Array) -> SessionBatch:
    """Make a batch of some sessions, in the order of ``which``.

    Args:
        rows: The rows of these sessions and of others.
        which: Indices of sessions in ``rows``, ``(B,)``.
        tracks: Normalised features of all tracks, ``(tracks, 29)`` float32.
    """
    lengths = rows.lengths[which]
    first = _Half(rows, rows.starts[which], lengths // 2, lengths)
    second = _Half(rows, rows.starts[which] + lengths // 2, lengths - lengths // 2, lengths)
    a, b = first.empty(FIRST_GROUPS), second.empty(SECOND_GROUPS)
    for half, groups in ((first, a), (second, b)):
        half.fill_position(groups["position"])
        features = tracks[half.values("track")]
        groups["popularity"][:] = features[:, : len(POPULARITY)]
        groups["music"][:] = features[:, len(POPULARITY) :]
    _fill_context(first, a["context"])
    _fill_interaction(first, a["interaction"])
    return SessionBatch(
        first=first.padded(a),
        second=second.padded(b),
        target=second.padded({"": second.values("skip_2")[:, None]}).squeeze(-1),
        first_padding=torch.from_numpy(~first.real),
        second_padding=torch.from_numpy(~second.real),
        session_ids=rows.session_ids.take(which).to_pylist(),
    )


class _Half:
    """The tracks of one half of B sessions, without padding.

    Args:
        rows: Rows of sessions.
        starts: First row of the half of each session, ``(B,)``.
        counts: Tracks of the half, ``(B,)``.
        lengths: Tracks of the session, ``(B,)``.

    Attributes:
        real: Whether there is a track, ``(B, 10)`` bool.
        rows: Row of each track, ``(tracks,)``.
        lengths: Tracks of the session of each track, ``(tracks,)``.
    """

    def __init__(self, rows: Rows, starts: Array, counts: Array, lengths: Array):
        self.real = np.arange(HALF) < counts[:, None]
        self.rows = (starts[:, None] + np.arange(HALF))[self.real]
        self.lengths = np.repeat(lengths, counts)
        self._columns = rows.columns

    def values(self, name: str) -> Array:
        """A column, ``(tracks,)``."""
        return self._columns[name][self.rows]

    def empty(self, groups: Mapping[str, int]) -> dict[str, Array]:
        """An uninitialised matrix for each group, ``(tracks, width)`` float32."""
        return {
            name: np.empty((len(self.rows), width), np.float32) for name, width in groups.items()
        }

    def padded(self, groups: Mapping[str, Array]) -> Tensor:
        """The groups concatenated and padded with zeros, ``(B, 10, sum of widths)`` float32."""
        width = sum(group.shape[1] for group in groups.values())
        result = np.zeros((*self.real.shape, width), np.float32)
        result[self.real] = np.concatenate(list(groups.values()), 1)
        return torch.from_numpy(result)

    def fill_position(self, out: Array) -> None:
        out[:, 0] = self.values("session_position") / np.float32(10) - 1
        out[:, 1] = self.lengths / np.float32(10) - 1


def _circle(period: int) -> Array:
    """Sine and cosine of the angles 2 pi k / period, ``(period, 2)`` float32."""
    angle = 2 * np.pi * np.arange(period) / period
    return np.stack([np.sin(angle), np.cos(angle)], 1).astype(np.float32)


def _one_hot(names: Sequence[str], own: Sequence[str]) -> Array:
    """A one-hot row for each of ``names``; those not in ``own`` share the last column.

    Returns:
        ``(names, own + 1)`` float32.
    """
    place = [own.index(name) if name in own else len(own) for name in names]
    table: Array = np.eye(len(own) + 1, dtype=np.float32)[place]
    return table


_HOURS, _WEEKDAYS = _circle(24), _circle(7)
_CONTEXTS = np.eye(len(CONTEXT_TYPES), dtype=np.float32)
_STARTS = _one_hot(START_NAMES, START_REASONS)
_ENDS = _one_hot(END_NAMES, END_REASONS)


def _fill_context(half: _Half, out: Array) -> None:
    weekday = (half.values("date") + 3) % 7  # Monday is 0; 1970-01-01 was a Thursday
    out[:, :6] = _CONTEXTS[half.values("context_type")]
    out[:, 6] = half.values("premium")
    out[:, 7] = half.values(HISTORY + "is_shuffle")
    out[:, 8:10] = _HOURS[half.values("hour_of_day")]
    out[:, 10:12] = _WEEKDAYS[weekday]
    out[:, 12] = weekday >= 5


def _fill_interaction(half: _Half, out: Array) -> None:
    for i, name in enumerate(_FLAGS):
        out[:, i] = half.values(name)
    for i, name in enumerate(_SEEKS):
        out[:, 8 + i] = np.log1p(half.values(name).astype(np.float32))
    out[:, 10:20] = _STARTS[half.values(HISTORY + "reason_start")]
    out[:, 20:29] = _ENDS[half.values(HISTORY + "reason_end")]
