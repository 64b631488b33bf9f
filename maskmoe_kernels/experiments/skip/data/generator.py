"""Generated sessions in the official csv format, with one known cause behind each label of B.

Lengths, contexts, accounts, reasons, skips and their persistence, and the tracks' features follow
the counts in :mod:`.calibration`; the rules that decide half B are those of :mod:`.causes`.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv
from rich.console import Console
from rich.progress import track as show

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.files import claim, replacing
from maskmoe_kernels.experiments.shared.report import read_json, write_json
from maskmoe_kernels.experiments.skip.data import calibration, causes
from maskmoe_kernels.experiments.skip.data.catalogue import Array, Catalogue, draw, random_ids
from maskmoe_kernels.experiments.skip.data.mssd_columns import (
    LOG_COLUMNS,
    LONGEST,
    SHORTEST,
    START_NAMES,
    TRACK_COLUMNS,
)

#: Sessions of a chunk: one ``log_*.csv`` and one ``causes_*.parquet``.
CHUNK = 25_000
#: Below this, a kind of track that a rule needs may be missing.
FEWEST_TRACKS = 2_000

#: Tracks of B that a run at the end of A decides, and how long a run has to be.
FADE, RUN = 6, 4
# Sessions by what may decide them. Free accounts are the ones that context decides.
_FREE = 1 - calibration.PREMIUM
_KINDS = {"persistence": 0.38, "context": _FREE, "context+interaction": 0.13}
_KINDS["tracks"] = 1 - sum(_KINDS.values())
# Tracks of B in sessions of the kind "tracks".
_OF_TRACKS = {"chance": 0.25, "popularity": 0.25, "music": 0.25, "popularity+music": 0.25}
# In A; half B of a persistent session repeats itself more often, that of others less.
_STAY = 0.68
_REMEDY = "Name an empty folder, or delete this one."
_OWN = ("user_collection", "catalog")
_H = "hist_user_behavior_"


@dataclass(frozen=True)
class Settings:
    """All that decides what is generated; equal settings give equal files.

    Attributes:
        sessions: Number of sessions.
        seed: Of everything.
        tracks: Number of tracks.
        chunk: Sessions of a file.
    """

    sessions: int
    seed: int = 0
    tracks: int = 50_000
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        if self.sessions < 1 or self.chunk < 1 or self.seed < 0:
            raise ValueError(
                "sessions and chunk must be at least 1 and seed at least 0, got "
                f"{self.sessions}, {self.chunk} and {self.seed}"
            )
        if self.tracks < FEWEST_TRACKS:
            raise ValueError(f"tracks must be at least {FEWEST_TRACKS}, got {self.tracks}")

    @property
    def chunks(self) -> int:
        """Number of files of each kind."""
        return -(-self.sessions // self.chunk)


def generate(
    out: str | Path, settings: Settings, *, workers: int = 1, progress: bool = False
) -> None:
    """Write ``tf_0.csv``, ``log_*.csv`` and ``causes_*.parquet`` to ``out``.

    Chunks that a run with the same settings wrote before are left as they are. Memory: one chunk
    a worker.

    Raises:
        DataError: ``out`` holds sessions of other settings, or of unknown ones.
        ValueError: ``workers`` is below 1.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    out = claim(out)
    _claim(out, settings)
    catalogue = _catalogue(settings.tracks, settings.seed)
    if not (out / "tf_0.csv").is_file():
        header = [column.name for column in TRACK_COLUMNS]
        _write_csv(out / "tf_0.csv", header, catalogue.table())
    todo = [k for k in range(settings.chunks) if not (out / f"log_{k}.csv").is_file()]
    done = _chunks(out, settings, todo, workers)
    console = Console(stderr=True)
    for _ in show(done, "generate", len(todo), console=console, disable=not progress):
        pass


def _claim(out: Path, settings: Settings) -> None:
    """Write down whose folder it is, or check that it is ours."""
    path = out / "generation.json"
    if path.is_file():
        found = read_json(path, _REMEDY)
        if found != vars(settings):
            raise DataError(f"{path}: expected {vars(settings)}, got {found}. {_REMEDY}")
    elif strange := sorted(p.name for k in ("log_*", "tf_*", "causes_*") for p in out.glob(k)):
        raise DataError(
            f"{out}: expected no sessions of unknown origin, got {strange[:5]}. Name an empty "
            "folder."
        )
    else:
        write_json(path, vars(settings))


def _chunks(out: Path, settings: Settings, todo: list[int], workers: int) -> Iterator[None]:
    if workers == 1 or len(todo) < 2:
        for number in todo:
            _write_chunk(out, settings, number)
            yield
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(todo)), mp_context=context) as pool:
        tasks: list[Future[None]] = [pool.submit(_write_chunk, out, settings, k) for k in todo]
        for task in as_completed(tasks):
            task.result()
            yield


@lru_cache(maxsize=1)
def _catalogue(tracks: int, seed: int) -> Catalogue:
    return Catalogue.draw(tracks, seed)


def _write_chunk(out: Path, settings: Settings, number: int) -> None:
    log, why = draw_chunk(settings, number)
    with replacing(out / f"causes_{number}.parquet") as file:
        pq.write_table(causes.sealed(why), file)
    # Last: with it the chunk is done.
    _write_csv(out / f"log_{number}.csv", [column.name for column in LOG_COLUMNS], log)


def _write_csv(path: Path, header: list[str], table: Any) -> None:
    with replacing(path) as file:
        file.write((",".join(header) + "\n").encode())
        # No value needs quotes.
        plain = csv.WriteOptions(include_header=False, quoting_style="none")
        csv.write_csv(table.select(header), file, plain)


def draw_chunk(settings: Settings, number: int) -> tuple[Any, Any]:
    """One chunk: the rows of its log in official columns, and the causes of its tracks in B.

    Args:
        number: Which chunk; it decides the chunk together with ``settings.seed`` and ``tracks``.
    """
    random = np.random.default_rng([settings.seed, 1, number])
    count = min(settings.chunk, settings.sessions - number * settings.chunk)
    catalogue = _catalogue(settings.tracks, settings.seed)
    sessions = _Sessions(random, count)
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
    why = pa.table(
        {
            "session_id": columns["session_id"].filter(pa.array(second)),
            "session_position": columns["session_position"][second].astype(np.uint8),
            "cause": pa.DictionaryArray.from_arrays(
                sessions.cause[real][second].astype(np.int8), pa.array(causes.CAUSES)
            ),
            "decisive": sessions.decisive[real][second],
        },
        schema=causes.SCHEMA,
    )
    return pa.table({column.name: columns[column.name] for column in LOG_COLUMNS}), why


class _Sessions:
    """Sessions of a chunk; matrices are ``(sessions, 20)``, and what lies beyond a length is void.

    Attributes:
        lengths: Tracks of each session.
        real: Is there a track?
        second: Is it in half B?
        kind: Of each session, an index into ``_KINDS``.
        own: Is the music the listener's own choice?
        sought: Does the listener seek forward, in sessions that are decided by it too?
        skip: skip_2.
        track: Row in the catalogue.
        cause: Index into ``causes.CAUSES``; in half A, void.
        decisive: Was the label decided by the cause, and not turned round?
    """

    def __init__(self, random: Any, count: int):
        self.random = random
        self.lengths = SHORTEST + draw(random, calibration.SESSION_LENGTHS, count)
        place = np.arange(LONGEST)
        half = (self.lengths // 2)[:, None]
        self.real = place < self.lengths[:, None]
        self.second = self.real & (place >= half)
        self.kind = draw(random, list(_KINDS.values()), count)
        self.own = self._choose_own(count)
        self.sought = (random.random(count) < 0.5) & self.of("context+interaction")
        self.skip = np.zeros((count, LONGEST), bool)
        self.cause = np.zeros((count, LONGEST), np.int8)
        self._play_first_half(half)
        self._half = half

    def of(self, kind: str) -> Array:
        """Which sessions are of a kind, ``(sessions,)`` bool."""
        chosen: Array = self.kind == list(_KINDS).index(kind)
        return chosen

    def _choose_own(self, count: int) -> Array:
        """Half of the sessions whose rule looks at it; of the others, what the counts leave."""
        contexts = calibration.CONTEXTS
        share = sum(contexts[name] for name in _OWN) / sum(contexts.values())
        used = _KINDS["context"] + _KINDS["context+interaction"]
        looked_at = self.of("context") | self.of("context+interaction")
        chance = np.where(looked_at, 0.5, (share - 0.5 * used) / (1 - used))
        own: Array = self.random.random(count) < chance
        return own

    def _play_first_half(self, half: Array) -> None:
        """Skips of A, from its last track back: a run, then a chain that stays or changes."""
        count = len(half)
        self.last = self.random.random(count) < calibration.SKIP
        longer = RUN + self.random.geometric(1 - _STAY, count) - 1
        shorter = 1 + draw(self.random, _STAY ** np.arange(RUN - 1), count)
        run = np.where(self.of("persistence"), longer, shorter)[:, None]
        back = np.arange(LONGEST // 2)
        turns = self.random.random((count, LONGEST // 2)) < 1 - _STAY
        turns = np.where(back < run, False, (back == run) | turns)
        backward = self.last[:, None] ^ (np.cumsum(turns, 1) % 2 == 1)
        rows, places = np.nonzero(np.arange(LONGEST) < half)
        self.skip[rows, places] = backward[rows, half[rows, 0] - 1 - places]

    def decide(self, catalogue: Catalogue) -> None:
        """Half B: a cause for each track, a track that goes with it, and the label."""
        random, shape = self.random, self.skip.shape
        self.track = random.integers(0, len(catalogue.style), shape)
        coin = random.random(shape) < 0.5
        other = random.random(shape) < 0.5
        label = random.random(shape) < calibration.SKIP

        def rule(name: str, where: Array, skipped: Array) -> None:
            self.cause[where] = causes.CAUSES.index(name)
            np.copyto(label, skipped, where=where)

        second, tracks = self.second, self.of("tracks")[:, None]
        early = np.arange(LONGEST) < self._half + FADE
        rule("persistence", second & self.of("persistence")[:, None] & early, self.last[:, None])
        rule("context", second & self.of("context")[:, None], ~self.own[:, None])
        both = self.sought ^ ~self.own
        rule("context+interaction", second & self.of("context+interaction")[:, None], both[:, None])
        drawn = draw(random, list(_OF_TRACKS.values()), shape)
        energetic = (random.random(len(self.lengths)) < 0.5)[:, None]
        kind = np.where(second, _PLACES["plain"], -1)
        for i, name in enumerate(_OF_TRACKS):
            at = second & tracks & (drawn == i)
            if name == "popularity":
                rule(name, at, coin)
                kind[at] = np.where(coin, _PLACES["low"], _PLACES["high"])[at]
            elif name == "music":
                rule(name, at, coin ^ energetic)
                kind[at] = np.where(coin, _PLACES["energetic"], _PLACES["acoustic"])[at]
            elif name == "popularity+music":
                rule(name, at, coin ^ other)
                kind[at] = (_PLACES["minor old"] + 2 * coin + other)[at]
        side = np.where(energetic, _PLACES["energetic"], _PLACES["acoustic"])
        kind = np.where(self.real & ~second & tracks, side, kind)
        for place, name in enumerate(_KINDS_OF_TRACK):
            rows = catalogue.kinds[name]
            at = kind == place
            self.track[at] = rows[random.integers(0, len(rows), int(at.sum()))]
        turned = random.random(shape) < causes.NOISE
        decided = second & (self.cause > 0)
        self.decisive = decided & ~turned
        np.copyto(self.skip, label ^ (turned & decided), where=second)


_KINDS_OF_TRACK = (
    "plain", "low", "high", "acoustic", "energetic", "minor old", "minor new", "major old",
    "major new",
)  # fmt: skip
_PLACES = {name: place for place, name in enumerate(_KINDS_OF_TRACK)}


def _interactions(random: Any, sessions: _Sessions) -> dict[str, Any]:
    """The columns of what the listener did, row by row."""
    skip = sessions.skip[sessions.real]
    count = len(skip)
    starts = np.cumsum(sessions.lengths) - sessions.lengths
    skip_3 = skip | (random.random(count) < calibration.SKIP_3_UNLESS_2)
    names = list(calibration.END)
    counts = np.array(list(calibration.END.values()), float)
    skipped = counts * [calibration.SKIPPED_OF_END[name] for name in names]
    end = np.where(skip, draw(random, skipped, count), draw(random, counts - skipped, count))
    # A track starts as the one before it ended; after an end of playing, and at first, otherwise.
    again = np.array([START_NAMES.index(n) if n in _GOES_ON else -1 for n in names])
    begin = np.append(-1, again[end[:-1]])
    begin[starts] = -1
    fresh = [n for n in calibration.START if n not in ("fwdbtn", "backbtn", "trackdone")]
    fresh_codes = np.array([START_NAMES.index(name) for name in fresh])
    drawn = fresh_codes[draw(random, [calibration.START[name] for name in fresh], count)]
    begin = np.where(begin < 0, drawn, begin)
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
        _H + "reason_start": pa.array(START_NAMES).take(pa.array(begin)),
        _H + "reason_end": pa.array(names).take(pa.array(end)),
    }


_GOES_ON = ("trackdone", "fwdbtn", "backbtn")


def _seeks(random: Any, sessions: _Sessions, starts: Array) -> dict[str, Any]:
    """Seeks are rare, but where they decide they are frequent or, in half A, absent."""
    session = np.repeat(np.arange(len(starts)), sessions.lengths)
    matters = sessions.of("context+interaction")[session]
    rate = np.where(matters, 0.8 * sessions.sought[session], calibration.SEEK_FORWARD)
    forward = random.random(len(session)) < rate
    # At least one, on the last track of A.
    last = starts + sessions.lengths // 2 - 1
    forward[last] |= sessions.sought
    back = random.random(len(session)) < calibration.SEEK_BACK
    return {
        _H + "n_seekfwd": (forward * random.geometric(0.6, len(session))).astype(np.int32),
        _H + "n_seekback": (back * random.geometric(0.6, len(session))).astype(np.int32),
    }


def _contexts(random: Any, sessions: _Sessions, session: Array) -> dict[str, Any]:
    """The columns of the context, the same for all rows of a session."""
    count = len(sessions.lengths)
    names = list(calibration.CONTEXTS)
    counts = np.array(list(calibration.CONTEXTS.values()), float)
    own = np.array([name in _OWN for name in names])
    chosen, given = draw(random, counts * own, count), draw(random, counts * ~own, count)
    place = np.where(sessions.own, chosen, given)
    free = sessions.of("context")
    shuffle = np.where(free, random.random(count) < 0.5, sessions.of("context+interaction"))
    day = np.datetime64("2018-07-15") + random.integers(0, 66, count)
    return {
        _H + "is_shuffle": shuffle[session],
        "hour_of_day": draw(random, calibration.hour_shares(), count)[session].astype(np.int32),
        "date": pa.array(day).take(pa.array(session)),
        "premium": ~free[session],
        "context_type": pa.array(names).take(pa.array(place[session])),
    }
