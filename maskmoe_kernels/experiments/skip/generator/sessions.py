"""Draws sessions: their tracks, their skips, and the causes of the labels of half B."""

from __future__ import annotations

from typing import Any

import numpy as np

from maskmoe_kernels.experiments.skip.data.arrays import Array
from maskmoe_kernels.experiments.skip.data.columns import LONGEST, SHORTEST
from maskmoe_kernels.experiments.skip.data.features import HALF
from maskmoe_kernels.experiments.skip.generator import calibration
from maskmoe_kernels.experiments.skip.generator.catalogue import KINDS, Catalogue, draw
from maskmoe_kernels.experiments.skip.generator.causes import CAUSES, NOISE

#: If half A ends with at least ``RUN`` equal labels, they decide the first ``FADE`` tracks of B.
FADE, RUN = 6, 4
#: Contexts in which the listener chose the music.
OWN = ("user_collection", "catalog")

# Kind of session, by what decides its half B -> share. The context decides all free accounts.
_FREE = 1 - calibration.PREMIUM
_SESSIONS = {"persistence": 0.38, "context": _FREE, "context+interaction": 0.13}
_SESSIONS["tracks"] = 1 - sum(_SESSIONS.values())
# In sessions of the kind "tracks": cause of a track of half B -> share.
_TRACKS = {"chance": 0.25, "popularity": 0.25, "music": 0.25, "popularity+music": 0.25}
# Probability that a label of half A equals the one after it.
_STAY = 0.68
# Kind of track -> its code in ``decide``.
_CODES = {name: code for code, name in enumerate(KINDS)}


class Sessions:
    """Randomly drawn sessions.

    Matrices are ``(sessions, 20)``; what they hold beyond a session's length means nothing.

    Args:
        random: numpy's generator.
        count: Number of sessions.

    Attributes:
        lengths: Tracks of each session, ``(sessions,)``.
        real: Whether there is a track.
        second: Whether there is a track of half B.
        own: Whether the listener chose the music, ``(sessions,)`` bool.
        sought: Whether seeks forward of the listener decide labels, ``(sessions,)`` bool.
        skip: skip_2.
        track: Row in the catalogue.
        cause: Index into ``CAUSES``; only for half B.
        decisive: Whether the cause determined the label, and noise did not flip it.
    """

    def __init__(self, random: Any, count: int):
        self.random = random
        self.lengths = SHORTEST + draw(random, calibration.SESSION_LENGTHS, count)
        place = np.arange(LONGEST)
        self._half = (self.lengths // 2)[:, None]
        self.real = place < self.lengths[:, None]
        self.second = self.real & (place >= self._half)
        self._kind = draw(random, list(_SESSIONS.values()), count)
        self.own = self._draw_own(count)
        self.sought = (random.random(count) < 0.5) & self.are("context+interaction")
        self.skip = np.zeros((count, LONGEST), bool)
        self.cause = np.zeros((count, LONGEST), np.int8)
        self._draw_first_half()

    def are(self, kind: str) -> Array:
        """Which sessions are of a kind, ``(sessions,)`` bool."""
        chosen: Array = self._kind == list(_SESSIONS).index(kind)
        return chosen

    def _draw_own(self, count: int) -> Array:
        """``own``: half of the sessions whose rule uses it, and of all as many as calibrated."""
        contexts = calibration.CONTEXTS
        share = sum(contexts[name] for name in OWN) / sum(contexts.values())
        used = _SESSIONS["context"] + _SESSIONS["context+interaction"]
        uses = self.are("context") | self.are("context+interaction")
        probability = np.where(uses, 0.5, (share - 0.5 * used) / (1 - used))
        own: Array = self.random.random(count) < probability
        return own

    def _draw_first_half(self) -> None:
        """Labels of half A, from its last track backwards: a run of equal labels, then a chain."""
        count = len(self._half)
        self._last = self.random.random(count) < calibration.SKIP
        longer = RUN + self.random.geometric(1 - _STAY, count) - 1
        shorter = 1 + draw(self.random, _STAY ** np.arange(RUN - 1), count)
        run = np.where(self.are("persistence"), longer, shorter)[:, None]
        back = np.arange(HALF)
        changes = self.random.random((count, HALF)) < 1 - _STAY
        changes = np.where(back < run, False, (back == run) | changes)
        backward = self._last[:, None] ^ (np.cumsum(changes, 1) % 2 == 1)
        rows, places = np.nonzero(np.arange(LONGEST) < self._half)
        self.skip[rows, places] = backward[rows, self._half[rows, 0] - 1 - places]

    def decide(self, catalogue: Catalogue) -> None:
        """Draw the tracks, and for half B the causes and the labels that follow from them.

        Args:
            catalogue: The tracks to draw from.
        """
        random, shape = self.random, self.skip.shape
        self.track = random.integers(0, len(catalogue.style), shape)
        coin = random.random(shape) < 0.5
        other = random.random(shape) < 0.5
        label = random.random(shape) < calibration.SKIP
        self._decide_by_session(label)
        kind = self._decide_by_track(label, coin, other)
        for name, code in _CODES.items():
            rows = catalogue.kinds[name]
            at = kind == code
            self.track[at] = rows[random.integers(0, len(rows), int(at.sum()))]
        flipped = random.random(shape) < NOISE
        decided = self.second & (self.cause > 0)
        self.decisive = decided & ~flipped
        np.copyto(self.skip, label ^ (flipped & decided), where=self.second)

    def _decide_by_session(self, label: Array) -> None:
        """Apply the rules that look at half A and the context; write into ``label``."""
        early = np.arange(LONGEST) < self._half + FADE
        for name, skipped in (
            ("persistence", self._last),
            ("context", ~self.own),
            ("context+interaction", self.sought ^ ~self.own),
        ):
            at = self.second & self.are(name)[:, None]
            if name == "persistence":
                at &= early
            self._apply(name, at, skipped[:, None], label)

    def _decide_by_track(self, label: Array, coin: Array, other: Array) -> Array:
        """Apply the rules that look at the tracks; write into ``label``.

        Args:
            label: Labels so far.
            coin: Random bits, which choose the tracks.
            other: Further random bits.
        Returns:
            The kind of each track, a value of ``_CODES``; -1: any track.
        """
        tracks = self.are("tracks")[:, None]
        drawn = draw(self.random, list(_TRACKS.values()), label.shape)
        energetic = (self.random.random(len(self.lengths)) < 0.5)[:, None]  # kind of half A
        kind = np.where(self.second, _CODES["plain"], -1)
        for i, name in enumerate(_TRACKS):
            at = self.second & tracks & (drawn == i)
            if name == "popularity":
                self._apply(name, at, coin, label)
                kind[at] = np.where(coin, _CODES["low"], _CODES["high"])[at]
            elif name == "music":
                self._apply(name, at, coin ^ energetic, label)
                kind[at] = np.where(coin, _CODES["energetic"], _CODES["acoustic"])[at]
            elif name == "popularity+music":
                self._apply(name, at, coin ^ other, label)
                kind[at] = (_CODES["minor old"] + 2 * coin + other)[at]
        first = np.where(energetic, _CODES["energetic"], _CODES["acoustic"])
        return np.where(self.real & ~self.second & tracks, first, kind)

    def _apply(self, name: str, at: Array, skipped: Array, label: Array) -> None:
        """Let a cause decide the tracks ``at``; their labels become ``skipped``."""
        self.cause[at] = CAUSES.index(name)
        np.copyto(label, skipped, where=at)
