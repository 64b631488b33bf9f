"""The batches of an epoch: which sessions are in which batch, and how ranks share a batch.

The row groups are shuffled and divided into pools. The sessions of a pool are shuffled and divided
into batches of nearly equal size. Within a batch they are sorted by row group, so that a share (a
contiguous part of the batch) needs few row groups. Everything is computed from the seed, the epoch
and the sizes of the row groups, so the processes agree without communicating.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from maskmoe_kernels.experiments.skip.data.arrays import Ints


@dataclass(frozen=True)
class Pool:
    """Row groups whose sessions are shuffled together.

    Attributes:
        number: Index in the epoch.
        groups: Indices of the row groups. The sessions of a pool are numbered in this order.
        sizes: Number of sessions of each of ``groups``.
        first_batch: Index of the pool's first batch in the epoch.
        batches: Number of batches.
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
        sizes: Number of sessions of each row group, in file order.
        batch_size: Largest number of sessions of a batch, over all ranks.
        pool: Largest number of row groups of a pool.
        seed: Seed of the order; ``None``: file order.
        epoch: From 0; with a seed, each epoch has another order.
    """

    sizes: Sequence[int]
    batch_size: int
    pool: int
    seed: int | None
    epoch: int

    @cached_property
    def pools(self) -> list[Pool]:
        """The pools of the epoch in order; their numbers of row groups differ by at most 1."""
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
        """One worker's sessions of each batch of a pool, numbered within the pool.

        Args:
            pool: One of ``pools``.
            share: Rank and number of ranks.
            within: Worker and number of workers, which divide the rank's share.
        """
        order = np.arange(pool.sessions)
        if self.seed is not None:
            order = self._random(1 + pool.number).permutation(pool.sessions)
        group = np.repeat(np.arange(len(pool.groups)), pool.sizes)
        result = []
        for k in range(pool.batches):
            low, high = _part(0, pool.sessions, k, pool.batches)
            batch = order[low:high]
            batch = batch[np.argsort(group[batch], kind="stable")]
            low, high = _part(*_part(0, len(batch), *share), *within)
            result.append(batch[low:high])
        return result

    def _random(self, stream: int) -> Any:
        """A random generator: stream 0 orders the row groups, 1 + n the sessions of pool n."""
        return np.random.default_rng([self.seed or 0, self.epoch, stream])


def _part(low: int, high: int, part: int, parts: int) -> tuple[int, int]:
    """Bounds of part ``part`` of the range from ``low`` to ``high`` in ``parts`` equal parts.

    The sizes of the parts differ by at most 1.
    """
    size = high - low
    return low + part * size // parts, low + (part + 1) * size // parts
