"""The official columns of the Music Streaming Sessions Dataset and their valid values.

The data set is described in Brost, Mehrotra and Jehan (2019), "The Music Streaming Sessions
Dataset". Its licence forbids redistribution: users obtain ``log_*.csv`` and ``tf_*.csv``
themselves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date
from typing import Any

import pyarrow as pa

#: Fewest and most tracks of a session.
SHORTEST, LONGEST = 10, 20
#: Longest id that is accepted, in characters; the official ones have 38.
ID_LENGTH = 64
#: How the names of several log columns begin.
HISTORY = "hist_user_behavior_"

CONTEXT_TYPES = (
    "editorial_playlist", "radio", "user_collection", "catalog", "charts", "personalized_playlist",
)  # fmt: skip
# Each reason that occurs in the mini set has its own feature column. The other reasons a player
# may report are valid too; they share the feature column "other".
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

#: The spellings of true and of false.
TRUE, FALSE = ("true", "True", "TRUE", "1"), ("false", "False", "FALSE", "0")
_BOOLEANS = dict.fromkeys((*TRUE, "1.0"), 1) | dict.fromkeys((*FALSE, "0.0"), 0)
# Tables with a missing value anywhere in a column are often exported with 7.0 for 7.
_WHOLE = re.compile(r"([+-]?\d{1,9})(\.0*)?", re.ASCII)


@dataclass(frozen=True)
class Column:
    """One csv column and its valid values.

    Attributes:
        name: Name in the csv header and in the shards.
        kind: ``id``, ``flag`` (true or false), ``integer``, ``number``, ``name`` or ``date``.
        low: Smallest valid integer or number.
        high: Largest valid integer or number.
        names: Valid values of the kind ``name``; shards hold the index into them.
        numbered: Whether the index of a name may stand for it.
    """

    name: str
    kind: str
    low: float = 0
    high: float = 1
    names: tuple[str, ...] = ()
    numbered: bool = False

    @property
    def expected(self) -> str:
        """The valid values, in words for an error message."""
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
    def remedy(self) -> str:
        """How the valid values are written, for an error message."""
        match self.kind:
            case "id":
                how = "Give the row its id"
            case "flag":
                how = "Write true, True, TRUE or 1, and false, False, FALSE or 0"
            case "name":
                how = "Write one of these names"
                if self.numbered:
                    how += ", or " + ", ".join(f"{i} for {n}" for i, n in enumerate(self.names))
            case "date":
                how = "Write it like 2018-07-15 or 15-07-18"
            case "integer":
                how = "Write it in digits, like 1 or 1.0"
            case _:
                how = "Write it with a decimal point, like 0.5 or 5e-1"
        return f"{how}, or restore the official file."

    def parse(self, text: str) -> int | None:
        """The value of one field of the kind flag, integer, name or date; None if it has none.

        A flag is 0 or 1, a name its index, a date the days from 1970-01-01. Spaces around do not
        count, as pyarrow ignores them around numbers.
        """
        text = text.strip(" \t")
        match self.kind:
            case "flag":
                return _BOOLEANS.get(text)
            case "name" if text in self.names:
                return self.names.index(text)
            case "name" if not self.numbered:
                return None
            case "date":
                return parse_date(text)
        if match := _WHOLE.fullmatch(text):
            value = int(match[1])
            return value if self.kind == "integer" or 0 <= value < len(self.names) else None
        return _BOOLEANS.get(text) if self.kind == "integer" and self.high == 1 else None

    @property
    def arrow(self) -> Any:
        """The pyarrow type as which the csv column is parsed."""
        match self.kind:
            case "id":
                return pa.string()
            case "flag":
                return pa.bool_()
            case "integer":
                return pa.int32()
            case "number":
                return pa.float64()
        return pa.dictionary(pa.int32(), pa.string())  # few distinct values: each is parsed once


def _unit(*names: str) -> tuple[Column, ...]:
    return tuple(Column(name, "number", 0, 1) for name in names)


def _flags(*names: str) -> tuple[Column, ...]:
    return tuple(Column(name, "flag") for name in names)


def _bits(*names: str) -> tuple[Column, ...]:
    return tuple(Column(name, "integer", 0, 1) for name in names)


LOG_COLUMNS = (
    Column("session_id", "id"),
    Column("session_position", "integer", 0, 10**6),  # checked against the session later
    Column("session_length", "integer", 0, 10**6),
    Column("track_id_clean", "id"),
    *_flags("skip_1", "skip_2", "skip_3", "not_skipped"),
    *_bits(
        "context_switch", "no_pause_before_play", "short_pause_before_play",
        "long_pause_before_play",
    ),
    Column(HISTORY + "n_seekfwd", "integer", 0, 65535),
    Column(HISTORY + "n_seekback", "integer", 0, 65535),
    Column(HISTORY + "is_shuffle", "flag"),
    Column("hour_of_day", "integer", 0, 23),
    Column("date", "date"),
    Column("premium", "flag"),
    Column("context_type", "name", names=CONTEXT_TYPES),
    Column(HISTORY + "reason_start", "name", names=START_NAMES),
    Column(HISTORY + "reason_end", "name", names=END_NAMES),
)  # fmt: skip

#: The track features that form the popularity group.
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
    Column("mode", "name", names=MODES, numbered=True),
    *_unit("organism", "speechiness"),
    Column("tempo", "number", 0, 1000),
    Column("time_signature", "integer", 0, 12),
    *_unit("valence"),
    *(Column(f"acoustic_vector_{i}", "number", -100, 100) for i in range(8)),
)
#: The 29 track features in column order: popularity (3), then music (26).
TRACK_FEATURES = tuple(column.name for column in TRACK_COLUMNS[1:])

_ISO = re.compile(r"(\d{4})-(\d\d)-(\d\d)", re.ASCII)
_SHORT = re.compile(r"(\d\d)-(\d\d)-(\d\d)", re.ASCII)
_EPOCH = date(1970, 1, 1).toordinal()


def parse_date(text: str) -> int | None:
    """Days from 1970-01-01 to a date ``yyyy-mm-dd`` or ``dd-mm-yy``; None if it is neither."""
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
