"""The official columns of the Music Streaming Sessions Dataset, and what each may hold.

The data set is described in Brost, Mehrotra and Jehan (2019), "The Music Streaming Sessions
Dataset". It may not be redistributed, so a user brings the official ``log_*.csv``, ``tf_*.csv``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

UInt64s = npt.NDArray[np.uint64]

#: Fewest and most tracks of a session.
SHORTEST, LONGEST = 10, 20
#: Longest id taken for an id; the official ones have 38 characters.
ID_LENGTH = 64

CONTEXT_TYPES = (
    "editorial_playlist", "radio", "user_collection", "catalog", "charts", "personalized_playlist",
)  # fmt: skip
# The reasons with a column of their own are those counted in the mini set; what else a player
# may name is kept, and shares the column "other".
START_REASONS = (
    "trackdone", "fwdbtn", "backbtn", "appload", "trackerror", "clickrow", "playbtn", "remote",
    "endplay",
)  # fmt: skip
END_REASONS = (
    "trackdone", "fwdbtn", "backbtn", "endplay", "clickrow", "logout", "trackerror", "remote",
)  # fmt: skip
_RARE = ("clickside", "uriopen", "popup", "unknown", "persisted")
START_NAMES = (*START_REASONS, "logout", *_RARE)
END_NAMES = (*END_REASONS, "appload", "playbtn", *_RARE)
MODES = ("minor", "major")


@dataclass(frozen=True)
class Column:
    """One csv column and its values.

    Attributes:
        name: In the csv header and in the shards.
        kind: ``id``, ``flag`` (true or false), ``integer``, ``number``, ``name`` or ``date``.
        low: Least value of an integer or number.
        high: Greatest value.
        names: Of kind ``name``: the values; shards hold the index.
    """

    name: str
    kind: str
    low: float = 0
    high: float = 1
    names: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        """What the column holds, in words for an error."""
        match self.kind:
            case "id":
                return f"an id of 1 to {ID_LENGTH} characters"
            case "flag":
                return "true or false"
            case "name":
                return f"one of {', '.join(self.names)}"
            case "date":
                return "a date as yyyy-mm-dd or dd-mm-yy"
        noun = "a whole number" if self.kind == "integer" else "a number"
        return f"{noun} from {self.low:g} to {self.high:g}"

    @property
    def arrow(self) -> Any:
        """The type in which the csv is parsed."""
        match self.kind:
            case "id":
                return pa.string()
            case "flag":
                return pa.bool_()
            case "integer":
                return pa.int32()
            case "number":
                return pa.float64()
        return pa.dictionary(pa.int32(), pa.string())  # few distinct values: each is read once


def _unit(*names: str) -> tuple[Column, ...]:
    return tuple(Column(name, "number", 0, 1) for name in names)


def _flags(*names: str) -> tuple[Column, ...]:
    return tuple(Column(name, "flag") for name in names)


def _bits(*names: str) -> tuple[Column, ...]:
    return tuple(Column(name, "integer", 0, 1) for name in names)


_H = "hist_user_behavior_"
LOG_COLUMNS = (
    Column("session_id", "id"),
    Column("session_position", "integer", 0, 10**6),  # these two are held against the session
    Column("session_length", "integer", 0, 10**6),
    Column("track_id_clean", "id"),
    *_flags("skip_1", "skip_2", "skip_3", "not_skipped"),
    *_bits(
        "context_switch", "no_pause_before_play", "short_pause_before_play",
        "long_pause_before_play",
    ),
    Column(_H + "n_seekfwd", "integer", 0, 65535),
    Column(_H + "n_seekback", "integer", 0, 65535),
    Column(_H + "is_shuffle", "flag"),
    Column("hour_of_day", "integer", 0, 23),
    Column("date", "date"),
    Column("premium", "flag"),
    Column("context_type", "name", names=CONTEXT_TYPES),
    Column(_H + "reason_start", "name", names=START_NAMES),
    Column(_H + "reason_end", "name", names=END_NAMES),
)  # fmt: skip

#: Of the 29 features of a track, those of the popularity group.
POPULARITY = ("duration", "release_year", "us_popularity_estimate")
TRACK_COLUMNS = (
    Column("track_id", "id"),
    Column("duration", "number", 1, 1e5),
    Column("release_year", "integer", 1850, 2100),
    Column("us_popularity_estimate", "number", 0, 100),
    *_unit("acousticness", "beat_strength", "bounciness", "danceability"),
    Column("dyn_range_mean", "number", 0, 200),
    *_unit("energy"),
    Column("flatness", "number", 0, 10),
    *_unit("instrumentalness"),
    Column("key", "integer", 0, 11),
    *_unit("liveness"),
    Column("loudness", "number", -120, 30),
    *_unit("mechanism"),
    Column("mode", "name", names=MODES),
    *_unit("organism", "speechiness"),
    Column("tempo", "number", 0, 1000),
    Column("time_signature", "integer", 0, 12),
    *_unit("valence"),
    *(Column(f"acoustic_vector_{i}", "number", -100, 100) for i in range(8)),
)
#: The 29 features of a track in shard order: popularity (3), then music (26).
TRACK_FEATURES = tuple(column.name for column in TRACK_COLUMNS[1:])

_ISO = re.compile(r"(\d{4})-(\d\d)-(\d\d)", re.ASCII)
_SHORT = re.compile(r"(\d\d)-(\d\d)-(\d\d)", re.ASCII)
_EPOCH = date(1970, 1, 1).toordinal()


def parse_date(text: str) -> int | None:
    """Days since 1970 of ``yyyy-mm-dd`` or ``dd-mm-yy``; None where it is neither."""
    if match := _ISO.fullmatch(text):
        year, month, day = map(int, match.groups())
    elif match := _SHORT.fullmatch(text):
        day, month, year = map(int, match.groups())
        year += 2000
    else:
        return None
    try:
        return date(year, month, day).toordinal() - _EPOCH
    except ValueError:
        return None


def hash_ids(ids: Any) -> UInt64s:
    """A 64-bit digest of each id, the same on every machine and in every version.

    Over the 160 million sessions of the whole set, two ids share one with odds of 1 in 1400.

    Args:
        ids: ``pyarrow`` array of strings or a sequence of them, none null.
    Returns:
        ``(n,)`` uint64.
    """
    if isinstance(ids, Sequence):
        ids = pa.array(ids, pa.string())
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    if not len(ids):
        return np.empty(0, np.uint64)
    _, offsets, data = ids.buffers()
    bounds = np.frombuffer(offsets, np.int32)[ids.offset : ids.offset + len(ids) + 1]
    lengths = np.diff(bounds)
    words = -(-max(int(lengths.max()), 1) // 8)
    text = np.zeros((len(ids), 8 * words), np.uint8)
    if data is not None:
        filled = np.arange(8 * words) < lengths[:, None]
        text[filled] = np.frombuffer(data, np.uint8)[bounds[0] : bounds[-1]]
    digest = mix(lengths.astype(np.uint64))
    for word in text.view("<u8").T:
        # A shorter id is not touched by the words only longer ones have.
        digest = np.where(word != 0, mix(digest ^ word), digest)
    return digest


def mix(value: UInt64s) -> UInt64s:
    """Spread each value over 64 bits, one to one (the finaliser of splitmix64)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
