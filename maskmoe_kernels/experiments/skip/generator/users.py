"""Sessions of known users whose labels have known causes, for the schema ``users``.

Each user has ``SESSIONS`` sessions, one a day, after some shorter ones in which tracks become known
that later sessions need. Each track has one cause, in whichever half of a slice it falls:

====================  =========================================  ===================================
cause                 its tracks                                 it skips the track if
====================  =========================================  ===================================
chance                others                                     a random draw decides so
persistence           all of three in ten sessions               the session's mood decides so
favourite             favourites of the user, and banned ones    it is banned
popularity            hits, and tracks that nearly nobody plays  nobody plays it
discounted            heard three times, always with one label   that label was a skip
listener              heard once, a day ago or three days ago    it was a day ago
music                 of high or low energy                      its sign is not that of the valence
                                                                 of the user's other tracks
popularity+music      instrumental                               either major or new, but not both
popularity+listener   explicit                                   either the track is new or the
                                                                 listener young, but not both
listener+music        live                                       either major, or the listener
                                                                 young, but not both
discounted+music      remixes heard once, long ago               either skipped then, or major,
                                                                 but not both
====================  =========================================  ===================================

In the last four rules, one group alone carries no information about the label. Of the labels that
rules determine, a share ``NOISE`` is flipped; their tracks do not count as decisive.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from maskmoe_kernels.experiments.skip.data.arrays import Array, Ints
from maskmoe_kernels.experiments.skip.generator.causes import NOISE
from maskmoe_kernels.experiments.skip.schema.parse import shipped
from maskmoe_kernels.experiments.skip.schema.schema import Schema

USERS: Schema = shipped("users")
#: Sessions of a user.
SESSIONS = 10
_CAUSES = tuple(USERS.causes)
#: Cause of a track in sessions that persistence does not decide -> share.
_SHARES = {
    "chance": 0.14, "favourite": 0.16, "popularity": 0.16, "discounted": 0.09, "listener": 0.12,
    "music": 0.13, "popularity+music": 0.06, "popularity+listener": 0.05, "listener+music": 0.05,
    "discounted+music": 0.04,
}  # fmt: skip
#: Share of the sessions that persistence decides.
_PERSISTENT = 0.3
# Kinds of tracks -> share of the tracks of middle popularity. A user hears each track of a kind at
# most once, but for those whose cause is discounted.
_KINDS = {
    "low valence": 0.3, "high valence": 0.3, "low energy": 0.07, "high energy": 0.07,
    "instrumental": 0.07, "explicit": 0.06, "live": 0.06, "remix": 0.07,
}  # fmt: skip
_VERSIONS = ("studio", "instrumental", "live", "remix")
# How often each user may hear a kind; a kind has at least so many tracks.
_MOST = 640
_DAY, _HOUR = 86_400_000, 3_600_000
_START = 1_772_323_200_000  # 2026-03-01
# Days between the first events and the first session: what was heard then counts as long ago.
_LEAD = 7
# Tracks a user knows before the first session: always skipped or always played, and remixes.
_KNOWN, _REMIXES = 40, 20


@dataclass(frozen=True)
class Tracks:
    """The tracks.

    Attributes:
        ids: pyarrow strings, ``(tracks,)``.
        columns: Column -> ``(tracks,)``.
        kinds: Kind -> rows of its tracks; ``hit`` and ``rare`` are kinds, too.
    """

    ids: Any
    columns: dict[str, Array]
    kinds: dict[str, Ints]

    @classmethod
    def draw(cls, tracks: int, seed: int) -> Tracks:
        """Draw tracks.

        Args:
            tracks: How many have middle popularity; there are as many that are rare, and one hit
                for 250 of them, at least 100.
            seed: Seed, from 0.
        """
        random = np.random.default_rng([seed, 2, 0])
        names, sizes = list(_KINDS), np.maximum(tracks * np.array(list(_KINDS.values())), _MOST)
        bounds = np.cumsum(np.append(0, sizes.astype(np.int64)))
        kinds = {n: np.arange(a, b) for n, a, b in zip(names, bounds, bounds[1:], strict=False)}
        hits = max(tracks // 250, 100)
        middle = int(bounds[-1])
        kinds |= {"hit": middle + np.arange(hits), "rare": middle + hits + np.arange(tracks)}
        count = middle + hits + tracks
        noise = random.normal(0, 0.15, (2, count))
        energy, valence = noise[0], noise[1]
        for name, column in (("energy", energy), ("valence", valence)):
            column[kinds[f"low {name}"]] -= 1
            column[kinds[f"high {name}"]] += 1
        version = np.zeros(count, np.int64)
        for code, name in enumerate(_VERSIONS[1:], 1):
            version[kinds[name]] = code
        explicit = np.zeros(count, bool)
        explicit[kinds["explicit"]] = True
        new = random.random(count) < 0.5
        year = np.where(new, random.integers(2015, 2026, count), random.integers(1980, 2008, count))
        columns = {
            "release_year": year,
            "explicit": explicit,
            "energy": np.round(energy, 4),
            "valence": np.round(valence, 4),
            "tempo": np.round(random.normal(120, 25, count).clip(40, 240), 2),
            "danceability": np.round(random.normal(0, 1, count), 4),
            "acousticness": np.round(random.normal(0, 1, count), 4),
            "mode": random.integers(0, 2, count),
            "version": version,
        }
        return cls(pa.array([f"t{i}" for i in range(count)]), columns, kinds)

    def table(self) -> Any:
        """A pyarrow table with the columns of the schema."""
        named = {"mode": pa.array(("minor", "major")), "version": pa.array(_VERSIONS)}
        columns = {n: named[n].take(pa.array(c)) if n in named else c
                   for n, c in self.columns.items()}  # fmt: skip
        return pa.table({"track_id": self.ids} | columns)


class Users:
    """Some users, their events, relations and causes, drawn together.

    Matrices of a session are ``(users, 50)``; what they hold beyond its length means nothing.

    Args:
        tracks: The tracks.
        first: Number of the first user.
        count: Number of users.
        sessions: Of each user.
        seed: Seed, from 0.
    """

    def __init__(self, tracks: Tracks, first: int, count: int, sessions: int, seed: int):
        self.tracks, self.count, self.sessions = tracks, count, sessions
        self.random = np.random.default_rng([seed, 2, 1 + first])
        self.numbers = first + np.arange(count)
        self.young = self.random.random(count) < 0.5
        self.high = self.random.random(count) < 0.5  # valence of what the user likes to hear
        self._drawn = dict.fromkeys(tracks.kinds, 0)
        self._begin = {
            kind: self.random.integers(0, len(rows), count) for kind, rows in tracks.kinds.items()
        }
        self.events: list[dict[str, Array]] = []
        self.relations: dict[str, list[Array]] = {"favourites": [], "banned": []}
        self._hour = self.random.integers(7, 20, count) * _HOUR
        self._heard: list[tuple[Array, Array]] = []  # fresh tracks of each session, and whether
        self._known = self._introduce()
        for number in range(sessions):
            self._session(number)

    def fresh(self, kind: str, shape: tuple[int, ...]) -> Ints:
        """Tracks of a kind that their user has not heard, ``(users, n)``."""
        rows = self.tracks.kinds[kind]
        each = int(np.prod(shape[1:]))
        steps = self._drawn[kind] + np.arange(each)
        self._drawn[kind] += each
        found: Ints = rows[(self._begin[kind][:, None] + steps) % len(rows)]
        return found

    def liked(self, shape: tuple[int, ...]) -> Ints:
        """Fresh tracks of the valence that their user likes, ``(users, n)``."""
        low, high = self.fresh("low valence", shape), self.fresh("high valence", shape)
        return np.where(self.high[:, None], high, low)

    def _introduce(self) -> tuple[Ints, Ints, Array]:
        """Short sessions before the first one: tracks with one label each, and remixes.

        Returns:
            Tracks that are always skipped or played (the skipped ones are even), ``(users, 40)``;
            remixes, and whether they were skipped, ``(users, 20)``.
        """
        known = self.liked((self.count, _KNOWN))
        remixes = self.fresh("remix", (self.count, _REMIXES))
        skipped = self.random.random(remixes.shape) < 0.5
        heard = np.concatenate([known, known, known, remixes], 1)
        always = np.broadcast_to(np.arange(_KNOWN) % 2 == 0, known.shape)
        labels = np.concatenate([always, always, always, skipped], 1)
        for part, start in enumerate(range(0, heard.shape[1], 19)):
            columns = slice(start, start + 19)
            time = _START + part * 4 * _HOUR + self._hour
            self._add(f"i{part}", time, heard[:, columns], labels[:, columns])
        return known, remixes, skipped

    def _add(
        self, name: str, start: Array, track: Ints, label: Array, length: Array | None = None,
        **more: Array,
    ) -> None:  # fmt: skip
        shape = track.shape
        real = np.ones(shape, bool)
        if length is not None:
            real = np.arange(shape[1]) < length[:, None]
        pause = self.random.integers(20_000, 200_000, shape)
        time = start[:, None] + np.cumsum(pause, 1) - pause[:, :1]
        user = np.broadcast_to(self.numbers[:, None], shape)
        columns = {"user": user, "time": time, "track": track, "label": label} | more
        self.events.append({n: c[real] for n, c in columns.items()} | {"session": np.array(name)})

    def _session(self, number: int) -> None:
        random = self.random
        shape = (self.count, USERS.sessions.longest)
        length = random.integers(USERS.sessions.shortest, shape[1] + 1, self.count)
        start = _START + (_LEAD + number) * _DAY + self._hour
        start = start + random.integers(0, _HOUR, self.count)
        persistent = (random.random(self.count) < _PERSISTENT)[:, None]
        names = list(_SHARES)
        drawn = random.choice(len(names), shape, p=np.array(list(_SHARES.values())))
        codes = np.array([_CAUSES.index(name) for name in names])
        cause = np.where(persistent, _CAUSES.index("persistence"), codes[drawn])
        track = self.liked(shape)
        fresh = np.isin(cause, [_CAUSES.index("chance"), _CAUSES.index("persistence")])
        label = random.random(shape) < 0.5
        label = np.where(persistent, (random.random(self.count) < 0.5)[:, None], label)
        for name, decide in (
            ("favourite", self._favourite), ("popularity", self._popularity),
            ("discounted", self._discounted), ("listener", self._listener),
            ("popularity+music", self._both), ("popularity+listener", self._both),
            ("listener+music", self._both), ("discounted+music", self._remix),
        ):  # fmt: skip
            at = cause == _CAUSES.index(name)
            tracks, labels, possible = decide(name, number, at)
            cause[at & ~possible] = _CAUSES.index("chance")
            np.copyto(track, tracks, where=at & possible)
            np.copyto(label, labels, where=at & possible)
        at = cause == _CAUSES.index("music")
        loud = random.random(shape) < 0.5
        energy = np.where(loud, self.fresh("high energy", shape), self.fresh("low energy", shape))
        np.copyto(track, energy, where=at)
        np.copyto(label, loud != self.high[:, None], where=at)
        flipped = (random.random(shape) < NOISE) & (cause > 0)
        self._heard.append((track, fresh & (np.arange(shape[1]) < length[:, None])))
        decisive = (cause > 0) & ~flipped
        self._add(
            f"s{number}", start, track, label ^ flipped, length,
            cause=cause.astype(np.int8), decisive=decisive,
        )  # fmt: skip

    def _favourite(self, name: str, number: int, at: Array) -> tuple[Ints, Array, Array]:
        size = 12  # related tracks of a session
        pool = self.liked((self.count, size))
        which = _ranks(at, size)
        track = np.take_along_axis(pool, np.maximum(which, 0), 1)
        for row, relation in enumerate(("favourites", "banned")):
            of = pool[:, row::2]
            pairs = np.stack([np.repeat(self.numbers, of.shape[1]), of.reshape(-1)], 1)
            self.relations[relation].append(pairs)
        return track, which % 2 == 1, which >= 0

    def _popularity(self, name: str, number: int, at: Array) -> tuple[Ints, Array, Array]:
        rare = self.random.random(at.shape) < 0.5
        each = 8  # hits of a session
        which = _ranks(at & ~rare, each)
        hits = np.take_along_axis(self.fresh("hit", (self.count, each)), np.maximum(which, 0), 1)
        track = np.where(rare, self.random.choice(self.tracks.kinds["rare"], at.shape), hits)
        # Before the first session nobody has played anything for days.
        return track, rare, (rare | (which >= 0)) & (number > 0)

    def _discounted(self, name: str, number: int, at: Array) -> tuple[Ints, Array, Array]:
        known = self._known[0]
        each = known.shape[1] // self.sessions
        which = _ranks(at, each)
        columns = np.maximum(which, 0) + number * each
        return np.take_along_axis(known, columns, 1), columns % 2 == 0, which >= 0

    def _remix(self, name: str, number: int, at: Array) -> tuple[Ints, Array, Array]:
        _, remixes, skipped = self._known
        each = remixes.shape[1] // self.sessions
        which = _ranks(at, each)
        columns = np.maximum(which, 0) + number * each
        track = np.take_along_axis(remixes, columns, 1)
        major = self.tracks.columns["mode"][track] == 1
        return track, np.take_along_axis(skipped, columns, 1) ^ major, which >= 0

    def _listener(self, name: str, number: int, at: Array) -> tuple[Ints, Array, Array]:
        """Tracks that were fresh in the session before, or three before."""
        yesterday = self.random.random(at.shape) < 0.5
        track, possible = np.zeros(at.shape, np.int64), np.zeros(at.shape, bool)
        for back, wanted in ((1, at & yesterday), (3, at & ~yesterday)):
            if number < back:
                continue
            heard, unused = self._heard[-back]
            # The k-th use takes the k-th track that is fresh and was not used before.
            order = np.argsort(~unused, axis=1, kind="stable")
            which = _ranks(wanted, at.shape[1])
            place = np.take_along_axis(order, np.maximum(which, 0), 1)
            usable = (which >= 0) & np.take_along_axis(unused, place, 1)
            np.copyto(track, np.take_along_axis(heard, place, 1), where=usable)
            possible |= usable
            rows, columns = usable.nonzero()
            unused[rows, place[rows, columns]] = False
        return track, yesterday, possible

    def _both(self, name: str, number: int, at: Array) -> tuple[Ints, Array, Array]:
        kind = {"popularity+music": "instrumental", "listener+music": "live"}.get(name, "explicit")
        track = self.fresh(kind, at.shape)
        new = self.tracks.columns["release_year"][track] >= 2010
        major = self.tracks.columns["mode"][track] == 1
        young = np.broadcast_to(self.young[:, None], at.shape)
        first, second = {
            "popularity+music": (new, major), "popularity+listener": (new, young),
            "listener+music": (major, young),
        }[name]  # fmt: skip
        return track, first ^ second, np.ones(at.shape, bool)

    def tables(self) -> Iterator[tuple[str, Any]]:
        """Name of each table -> its rows, pyarrow: events, users, relations and causes."""
        ids = self.tracks.ids
        names = pa.array([f"u{i}" for i in self.numbers.tolist()])
        events, causes = [], []
        for part in self.events:
            user = names.take(pa.array(part["user"] - self.numbers[0]))
            session = pa.array([str(part["session"])] * len(user))
            events.append(
                pa.table(
                    {
                        "user_id": user,
                        "session_id": session,
                        "track_id": ids.take(pa.array(part["track"])),
                        "time": pa.array(part["time"]).cast(pa.timestamp("ms")),
                        "skipped": part["label"],
                    }
                )
            )
            if "cause" in part:
                causes.append((user, session, part))
        yield "events", pa.concat_tables(events)
        age = np.where(self.young, self.random.integers(14, 26, self.count),
                       self.random.integers(45, 76, self.count))  # fmt: skip
        yield "users", pa.table({"user_id": names, "age": age})
        for name, pairs in self.relations.items():
            pair = np.concatenate(pairs)
            since = np.full(len(pair), _START - _DAY)
            yield (
                name,
                pa.table(
                    {
                        "user_id": names.take(pa.array(pair[:, 0] - self.numbers[0])),
                        "track_id": ids.take(pa.array(pair[:, 1])),
                        "since": pa.array(since).cast(pa.timestamp("ms")),
                    }
                ),
            )
        yield "causes", pa.concat_tables([_causes(*part) for part in causes])


def _ranks(at: Array, size: int) -> Ints:
    """The number of each true place in its row, from 0, if below ``size``; -1 elsewhere."""
    ranks: Ints = np.cumsum(at, 1) - 1
    return np.where(at & (ranks < size), ranks, -1)


def _causes(user: Any, session: Any, part: dict[str, Array]) -> Any:
    """The causes of the tracks of one session of each user, a row per track."""
    names = pa.compute.binary_join_element_wise(user, session, "/")
    owner = part["user"]
    starts = np.append(0, (owner[1:] != owner[:-1]).nonzero()[0] + 1)
    lengths = np.diff(starts, append=len(owner))
    position = np.arange(len(owner)) - np.repeat(starts, lengths) + 1
    return pa.table(
        {
            "session_id": names,
            "session_position": position.astype(np.uint8),
            "cause": pa.DictionaryArray.from_arrays(part["cause"], pa.array(_CAUSES)),
            "decisive": part["decisive"],
        }
    )
