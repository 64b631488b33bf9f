"""The order of an epoch: which sessions make which batch, and whose share is which.

The row groups of an epoch are drawn in random order and dealt to pools. The sessions of a pool
are shuffled and cut into batches of nearly equal size; within a batch they are put in the order of
their row groups, so that a share of it (a contiguous part) touches few of them. All of it follows
from the seed, the epoch and the numbers of sessions: every process works it out for itself, and
none has to be told what the others do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pool:
    """Row groups whose sessions are shuffled together.

    Attributes:
        number: Place in the epoch.
        groups: Indices of the row groups, in the order in which their sessions are numbered.
        sizes: Sessions of each of ``groups``.
        first_batch: Number of the pool's first batch in the epoch.
        batches: Its number of batches.
    """

    number: int
    groups: Ints
    sizes: Ints
    first_batch: int
    batches: int

    @cached_property
    def sessions(self) -> int:
        """Number of sessions of the pool."""
        return int(self.sizes.sum())


@dataclass(frozen=True)
class Schedule:
    """The batches of one epoch.

    Attributes:
        sizes: Sessions of each row group, in file order.
        batch_size: Most sessions of a batch, over all ranks.
        pool: Most row groups of a pool.
        seed: Of the order; ``None``: file order.
        epoch: Another epoch, another order.
    """

    sizes: Sequence[int]
    batch_size: int
    pool: int
    seed: int | None
    epoch: int

    @cached_property
    def pools(self) -> list[Pool]:
        """The pools of the epoch in order; their row groups are dealt evenly."""
        count = len(self.sizes)
        order = np.arange(count)
        if self.seed is not None:
            order = self._random(0).permutation(count)
        sizes = np.asarray(self.sizes, np.int64)
        pools: list[Pool] = []
        batch = 0
        for number, groups in enumerate(np.array_split(order, -(-count // self.pool))):
            batches = -(-int(sizes[groups].sum()) // self.batch_size)
            pools.append(Pool(number, groups, sizes[groups], batch, batches))
            batch += batches
        return pools

    @cached_property
    def batches(self) -> int:
        """Number of batches of the epoch, the same for every rank."""
        return sum(pool.batches for pool in self.pools)

    def shares(self, pool: Pool, share: tuple[int, int], within: tuple[int, int]) -> list[Ints]:
        """Sessions of each batch that fall to one share, numbered within the pool.

        Args:
            share: Rank and number of ranks.
            within: Worker and number of workers, which divide the rank's share.
        """
        order = np.arange(pool.sessions)
        if self.seed is not None:
            order = self._random(1 + pool.number).permutation(pool.sessions)
        owner = np.repeat(np.arange(len(pool.groups)), pool.sizes)
        result = []
        for k in range(pool.batches):
            low, high = _part(0, pool.sessions, k, pool.batches)
            batch = order[low:high]
            batch = batch[np.argsort(owner[batch], kind="stable")]
            low, high = _part(*_part(0, len(batch), *share), *within)
            result.append(batch[low:high])
        return result

    def _random(self, stream: int) -> Any:
        return np.random.default_rng([self.seed or 0, self.epoch, stream])


def _part(low: int, high: int, part: int, parts: int) -> tuple[int, int]:
    """Bounds of one of ``parts`` nearly equal parts of a range."""
    size = high - low
    return low + part * size // parts, low + (part + 1) * size // parts
