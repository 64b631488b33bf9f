"""One generated log file: its rows in the official columns, and the causes of half B."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from maskmoe_kernels.experiments.skip.data.arrays import Array
from maskmoe_kernels.experiments.skip.data.columns import HISTORY, LOG_COLUMNS, START_NAMES
from maskmoe_kernels.experiments.skip.generator import calibration
from maskmoe_kernels.experiments.skip.generator.catalogue import Catalogue, draw, random_ids
from maskmoe_kernels.experiments.skip.generator.causes import CAUSES, SCHEMA
from maskmoe_kernels.experiments.skip.generator.sessions import OWN, Sessions
from maskmoe_kernels.experiments.skip.generator.settings import GeneratorSettings

# Ways in which a track ends that are also the way in which the next one starts.
_CONTINUES = ("trackdone", "fwdbtn", "backbtn")


@lru_cache(maxsize=1)
def catalogue_of(settings: GeneratorSettings) -> Catalogue:
    """The tracks that the settings determine; the last catalogue is cached."""
    return Catalogue.draw(settings.tracks, settings.seed)


def draw_chunk(settings: GeneratorSettings, number: int) -> tuple[Any, Any]:
    """Draw one chunk; it depends on ``number``, ``settings.seed`` and ``settings.tracks``.

    Args:
        settings: The settings.
        number: Index of the chunk.
    Returns:
        pyarrow tables: the log in its official columns, and the causes with the columns
        ``SCHEMA``, a row per track of half B.
    """
    random = np.random.default_rng([settings.seed, 1, number])
    count = min(settings.chunk, settings.sessions - number * settings.chunk)
    catalogue = catalogue_of(settings)
    sessions = Sessions(random, count)
    sessions.decide(catalogue)
    ids = random_ids(random, f"{number}_", count)
    real = sessions.real
    session = np.repeat(np.arange(count), sessions.lengths)
    columns: dict[str, Any] = {
        "session_id": ids.take(pa.array(session)),
        "session_position": (np.nonzero(real)[1] + 1).astype(np.int32),
        "session_length": sessions.lengths[session].astype(np.int32),
        "track_id_clean": catalogue.ids.take(pa.array(sessions.track[real])),
        **_interactions(random, sessions),
        **_contexts(random, sessions, session),
    }
    second = sessions.second[real]
    causes = pa.table(
        {
            "session_id": columns["session_id"].filter(pa.array(second)),
            "session_position": columns["session_position"][second].astype(np.uint8),
            "cause": pa.DictionaryArray.from_arrays(
                sessions.cause[real][second].astype(np.int8), pa.array(CAUSES)
            ),
            "decisive": sessions.decisive[real][second],
        },
        schema=SCHEMA,
    )
    return pa.table({column.name: columns[column.name] for column in LOG_COLUMNS}), causes


def _interactions(random: Any, sessions: Sessions) -> dict[str, Any]:
    """The columns of the interactions: name -> ``(rows,)``."""
    skip = sessions.skip[sessions.real]
    count = len(skip)
    starts = np.cumsum(sessions.lengths) - sessions.lengths
    skip_3 = skip | (random.random(count) < calibration.SKIP_3_UNLESS_2)
    end, begin = _reasons(random, skip, starts)
    pause = np.array(list(calibration.PAUSES), np.int32)[
        draw(random, list(calibration.PAUSES.values()), count)
    ]
    return {
        "skip_1": skip & (random.random(count) < calibration.SKIP_1_IF_2),
        "skip_2": skip,
        "skip_3": skip_3,
        "not_skipped": ~skip_3 & (random.random(count) < calibration.PLAYED_UNLESS_3),
        "context_switch": (random.random(count) < calibration.CONTEXT_SWITCH).astype(np.int32),
        "no_pause_before_play": pause[:, 0],
        "short_pause_before_play": pause[:, 1],
        "long_pause_before_play": pause[:, 2],
        **_seeks(random, sessions, starts),
        HISTORY + "reason_start": pa.array(START_NAMES).take(pa.array(begin)),
        HISTORY + "reason_end": pa.array(list(calibration.END)).take(pa.array(end)),
    }


def _reasons(random: Any, skip: Array, starts: Array) -> tuple[Array, Array]:
    """Why each track ends and starts.

    Args:
        random: numpy's generator.
        skip: skip_2, ``(rows,)``.
        starts: First row of each session.
    Returns:
        Indices into ``calibration.END`` and into ``START_NAMES``, each ``(rows,)``.
    """
    count = len(skip)
    names = list(calibration.END)
    counts = np.array(list(calibration.END.values()), float)
    skipped = counts * [calibration.SKIPPED_OF_END[name] for name in names]
    end = np.where(skip, draw(random, skipped, count), draw(random, counts - skipped, count))
    # A track starts as the previous one ended. The first track of a session, and one after any
    # other end, starts with a reason drawn from the remaining ones.
    same = np.array([START_NAMES.index(name) if name in _CONTINUES else -1 for name in names])
    begin = np.append(-1, same[end[:-1]])
    begin[starts] = -1
    others = [name for name in calibration.START if name not in _CONTINUES]
    codes = np.array([START_NAMES.index(name) for name in others])
    drawn = codes[draw(random, [calibration.START[name] for name in others], count)]
    return end, np.where(begin < 0, drawn, begin)


def _seeks(random: Any, sessions: Sessions, starts: Array) -> dict[str, Any]:
    """The columns of seeks. If the rule of a session uses seeks, they are frequent or absent; in
    the other sessions they are rare.
    """
    session = np.repeat(np.arange(len(starts)), sessions.lengths)
    matters = sessions.are("context+interaction")[session]
    rate = np.where(matters, 0.8 * sessions.sought[session], calibration.SEEK_FORWARD)
    forward = random.random(len(session)) < rate
    # Where seeks decide there is at least one, on the last track of half A.
    last = starts + sessions.lengths // 2 - 1
    forward[last] |= sessions.sought
    back = random.random(len(session)) < calibration.SEEK_BACK
    return {
        HISTORY + "n_seekfwd": (forward * random.geometric(0.6, len(session))).astype(np.int32),
        HISTORY + "n_seekback": (back * random.geometric(0.6, len(session))).astype(np.int32),
    }


def _contexts(random: Any, sessions: Sessions, session: Array) -> dict[str, Any]:
    """The columns of the context, which is the same in all rows of a session.

    Args:
        random: numpy's generator.
        sessions: The sessions.
        session: Index of the session of each row, ``(rows,)``.
    """
    count = len(sessions.lengths)
    names = list(calibration.CONTEXTS)
    counts = np.array(list(calibration.CONTEXTS.values()), float)
    own = np.array([name in OWN for name in names])
    chosen, given = draw(random, counts * own, count), draw(random, counts * ~own, count)
    context = np.where(sessions.own, chosen, given)
    free = sessions.are("context")
    shuffle = np.where(free, random.random(count) < 0.5, sessions.are("context+interaction"))
    day = np.datetime64("2018-07-15") + random.integers(0, 66, count)
    return {
        HISTORY + "is_shuffle": shuffle[session],
        "hour_of_day": draw(random, calibration.hour_shares(), count)[session].astype(np.int32),
        "date": pa.array(day).take(pa.array(session)),
        "premium": ~free[session],
        "context_type": pa.array(names).take(pa.array(context[session])),
    }
