"""The official columns of the Music Streaming Sessions Dataset, as its schema declares them."""

from __future__ import annotations

from maskmoe_kernels.experiments.skip.schema.column import Column
from maskmoe_kernels.experiments.skip.schema.column import parse_date as parse_date
from maskmoe_kernels.experiments.skip.schema.parse import shipped
from maskmoe_kernels.experiments.skip.schema.schema import Table

#: The schema of the data set.
MSSD = shipped("mssd")
#: Fewest and most tracks of a session.
SHORTEST, LONGEST = MSSD.sessions.shortest, MSSD.sessions.longest
#: How the names of several log columns begin.
HISTORY = "hist_user_behavior_"

LOG_COLUMNS: tuple[Column, ...] = MSSD.events.columns
_TRACKS: Table = MSSD.items or Table("", ())
TRACK_COLUMNS: tuple[Column, ...] = _TRACKS.columns
CONTEXT_TYPES = MSSD.events.by_name["context_type"].names
START_NAMES = MSSD.events.by_name[HISTORY + "reason_start"].names
END_NAMES = MSSD.events.by_name[HISTORY + "reason_end"].names
MODES = _TRACKS.by_name["mode"].names
# Each reason that occurs in the mini set has its own feature column. The other reasons a player
# may report are valid too; they share the feature column "other".
START_REASONS, END_REASONS = (
    next(f.names for g in MSSD.groups for f in g.features if f.source == HISTORY + name)
    for name in ("reason_start", "reason_end")
)
#: The track features that form the popularity group.
POPULARITY = next(group.columns for group in MSSD.groups if group.name == "popularity")
#: The 29 track features in column order: popularity (3), then music (26).
TRACK_FEATURES = tuple(column.name for column in TRACK_COLUMNS[1:])
