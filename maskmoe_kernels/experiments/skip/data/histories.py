"""What happened before a session: counts, rates and discounted rates of events, without a leak.

Every value is of events strictly before the first event of the session: an event at the same
instant, and all events of the session itself, do not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from maskmoe_kernels.experiments.skip.data.arrays import Array, Ints
from maskmoe_kernels.experiments.skip.schema.schema import Past


@dataclass(frozen=True)
class Histories:
    """Events grouped by a key, each group in order of time.

    Attributes:
        bounds: Where each group begins, and the number of events, ``(groups + 1,)`` int64.
        time: In ms, ``(events,)`` int64.
        labels: Number of true labels before each event over all groups, and in all,
            ``(events + 1,)`` int64.
    """

    bounds: Ints
    time: Array
    labels: Array

    @classmethod
    def group(cls, code: Array, time: Array, label: Array, groups: int) -> Histories:
        """Group events.

        Args:
            code: The group of each event, from 0, ``(events,)``.
            time: ``(events,)``.
            label: ``(events,)`` bool.
            groups: Number of groups.
        """
        order = np.lexsort((label, time, code))
        bounds = np.searchsorted(code[order], np.arange(groups + 1))
        return cls(bounds, time[order], np.append(0, np.cumsum(label[order], dtype=np.int64)))

    def before(self, code: Array, time: Array) -> Ints:
        """Where each group's events from ``time`` on begin, ``(n,)``.

        Args:
            code: Groups, ``(n,)``.
            time: ``(n,)``.
        """
        low, high = self.bounds[code], self.bounds[code + 1]
        last = max(len(self.time) - 1, 0)
        # Binary search in all groups at once: ``time`` may be a file that is not in memory.
        while (searched := low < high).any():
            middle = (low + high) // 2
            earlier = searched & (self.time[np.minimum(middle, last)] < time)
            low = np.where(earlier, middle + 1, low)
            high = np.where(searched & ~earlier, middle, high)
        return low

    def value(self, past: Past, code: Array, start: Array) -> Array:
        """A feature of the past, ``(n,)`` float64; see :class:`Past`.

        Args:
            past: What is computed.
            code: Groups, ``(n,)``.
            start: Starts of the sessions, ``(n,)``.
        """
        end = self.before(code, start)
        begin = self.bounds[code]
        if past.kind == "count":
            if past.window:
                begin = self.before(code, start - past.window)
            counts: Array = np.log1p(end - begin)
            return counts
        if past.kind == "rate":
            labels, count = self.labels[end] - self.labels[begin], end - begin
            return (labels + 0.5) / (count + 1)
        labels, count = self._discounted(past.half_life)
        last = np.maximum(end - 1, 0)
        if not len(self.time):
            return np.full(len(code), 0.5)
        decay = np.where(end > begin, np.exp2(-(start - self.time[last]) / past.half_life), 0)
        rate: Array = (labels[last] * decay + 0.5) / (count[last] * decay + 1)
        return rate

    def _discounted(self, half_life: int) -> tuple[Array, Array]:
        """Labels and events up to and with each event, discounted to its time, ``(events,)``."""
        sizes = np.diff(self.bounds)
        by_size = np.argsort(-sizes, kind="stable")
        sums = np.stack([np.diff(self.labels), np.ones(len(self.time))]).astype(np.float64)
        begin, descending = self.bounds[:-1][by_size], -sizes[by_size]
        # The n-th events of all groups at once, for all n.
        for n in range(1, int(sizes.max(initial=0))):
            at = begin[: np.searchsorted(descending, -n)] + n
            decay = np.exp2((self.time[at - 1] - self.time[at]) / half_life)
            sums[:, at] += sums[:, at - 1] * decay
        return sums[0], sums[1]
