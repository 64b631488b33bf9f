"""Batches of sessions streamed from the shards, each session once an epoch.

The sessions of batch k of an epoch depend only on the shards, the seed, the epoch, ``batch_size``
and ``pool`` (:mod:`.schedule`). The ranks divide each batch, and the workers divide their rank's
share. The shares of all ranks, concatenated, are bit for bit the batch of a single process.

The cursor counts the batches that :class:`SessionLoader` yielded, not the batches that its workers
prefetched. After ``load_state_dict`` the workers start at the next batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.skip.data.arrays import Ints
from maskmoe_kernels.experiments.skip.data.features import Draw, Rows, SessionBatch, assemble
from maskmoe_kernels.experiments.skip.data.schedule import Pool, Schedule
from maskmoe_kernels.experiments.skip.data.shards import Shards


class SessionDataset(IterableDataset[SessionBatch]):
    """One rank's share of the batches of an epoch.

    Without workers, an item is the rank's share of a batch. With W workers, a ``DataLoader``
    yields W items a batch, one from each worker; :class:`SessionLoader` joins them in order.

    Args:
        shards: The shards to read.
        batch_size: Largest number of sessions of a batch, over all ranks. The batches of a pool
            differ by at most one session.
        pool: Number of row groups that are shuffled together.
        seed: Seed of the order; ``None``: file order, the same in every epoch.
        rank: This rank, from 0.
        world: Number of ranks. All yield the same number of batches. A share is empty only if a
            pool holds fewer sessions than there are ranks.

    Attributes:
        epoch: The epoch that an iteration yields, from 0.
        start: The batch at which an iteration starts, from 0.

    Raises:
        DataError: The split holds no session.
        ValueError: ``batch_size`` is below 2 for each of several ranks, or an argument is out of
            range.
    """

    def __init__(
        self,
        shards: Shards,
        batch_size: int,
        *,
        pool: int = 16,
        seed: int | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        super().__init__()
        if not 0 <= rank < world:
            raise ValueError(f"rank must be one of 0..{world - 1} (world {world}), got {rank}")
        if pool < 1 or (seed is not None and seed < 0):
            raise ValueError(f"pool must be at least 1 and seed at least 0, got {pool} and {seed}")
        if batch_size < (2 * world if world > 1 else 1):
            raise ValueError(
                f"batch_size counts the sessions of all ranks and must be at least 2 for each of "
                f"{world}, got {batch_size}"
            )
        if not len(shards):
            raise DataError(
                f"{shards.folder}: expected sessions in {shards.split}, got none. Prepare more "
                "sessions: one in ten goes to valid, one in ten to test."
            )
        self.shards, self.batch_size, self.pool, self.seed = shards, batch_size, pool, seed
        self.rank, self.world = rank, world
        self.epoch = self.start = 0

    def schedule(self) -> Schedule:
        """The batches of the current epoch."""
        return Schedule(self.shards.sizes, self.batch_size, self.pool, self.seed, self.epoch)

    def __iter__(self) -> Iterator[SessionBatch]:
        worker = get_worker_info()
        within = (0, 1) if worker is None else (worker.id, worker.num_workers)
        schedule = self.schedule()
        for pool in schedule.pools:
            skip = max(self.start - pool.first_batch, 0)
            if skip < pool.batches:
                shares = schedule.shares(pool, (self.rank, self.world), within)[skip:]
                yield from self._batches(pool, shares)

    def _batches(self, pool: Pool, shares: list[Ints]) -> Iterator[SessionBatch]:
        """Decode only the row groups that the shares need, and yield a batch for each share.

        Args:
            pool: A pool of the schedule.
            shares: Sessions of each batch, numbered within the pool.
        """
        begin = np.cumsum(pool.sizes) - pool.sizes
        group = np.repeat(np.arange(len(pool.groups)), pool.sizes)
        needed = np.unique(group[np.concatenate(shares)])
        # Session of the pool -> its index among the decoded sessions.
        place = np.full(pool.sessions, -1)
        count = 0
        for i in needed.tolist():
            place[begin[i] : begin[i] + pool.sizes[i]] = count + np.arange(pool.sizes[i])
            count += int(pool.sizes[i])
        groups = pool.groups[needed] if len(needed) else pool.groups[:1]
        shards = self.shards
        tables = pa.concat_tables([shards.table(int(g)) for g in groups])
        rows = Rows.decode(tables, shards.schema)
        draw = None if self.seed is None else Draw(self.seed, self.epoch, training=True)
        for share in shares:
            yield assemble(rows, place[share], shards.tracks, shards.users, draw)


class SessionLoader:
    """Iterates over the batches of a rank, epoch after epoch, with a cursor that can be saved.

    ``for batch in loader`` yields the remaining batches of the current epoch; the next loop yields
    the next epoch. After a ``break`` the next loop continues with the next batch. If the ``break``
    was at the last batch, the next loop yields nothing and ends the epoch.

    Args:
        dataset: Where batches come from. The loader sets its ``epoch`` and ``start``.
        workers: Processes that prepare batches ahead; 0: batches are made in this process.
        pin_memory: Whether batches are in page-locked memory.
        prefetch: Batches that each worker prepares ahead.

    Attributes:
        epoch: The current epoch, from 0.
        batch: Batches of it that were yielded.
    """

    def __init__(
        self,
        dataset: SessionDataset,
        *,
        workers: int = 0,
        pin_memory: bool = False,
        prefetch: int = 4,
    ):
        self.dataset, self.workers, self.pin_memory = dataset, workers, pin_memory
        self.prefetch = prefetch
        self.epoch = self.batch = 0

    def __len__(self) -> int:
        """Number of batches of the current epoch; other epochs may have a few more or less."""
        self.dataset.epoch = self.epoch
        return self.dataset.schedule().batches

    def __iter__(self) -> Iterator[SessionBatch]:
        self.dataset.epoch, self.dataset.start = self.epoch, self.batch
        total = self.dataset.schedule().batches
        parts = max(self.workers, 1)
        source = iter(
            DataLoader(
                self.dataset,
                batch_size=None,
                num_workers=self.workers,
                prefetch_factor=self.prefetch if self.workers else None,
                # A generator of its own, so that a loop leaves torch's random state unchanged.
                generator=torch.Generator(),
            )
        )
        while self.batch < total:
            batch = SessionBatch.join([next(source) for _ in range(parts)])
            # Count the batch before it is used, so that a cursor saved meanwhile is after it.
            self.batch += 1
            yield batch.pin_memory() if self.pin_memory else batch
        self.epoch, self.batch = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """The cursor after the batch that was yielded last, in plain values."""
        data = self.dataset
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "digest": data.shards.digest,
            "split": data.shards.split,
            "batch_size": data.batch_size,
            "pool": data.pool,
            "seed": data.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch at which ``state`` was taken.

        The number of ranks and workers may differ from those of that run.

        Raises:
            DataError: The cursor is damaged, or belongs to other shards or to another order of
                their sessions.
        """
        own = self.state_dict()
        missing = own.keys() - state.keys()
        if missing:
            raise DataError(f"cursor: expected {sorted(own)}, got no {sorted(missing)}.")
        for name in own.keys() - {"epoch", "batch"}:
            if state[name] != own[name]:
                raise DataError(
                    f"cursor: expected {name} {own[name]!r}, as of this dataset, got "
                    f"{state[name]!r}. Resume with the shards and settings of the first run."
                )
        for name in ("epoch", "batch"):
            if not isinstance(state[name], int) or state[name] < 0:
                raise DataError(
                    f"cursor: expected {name} to be a whole number from 0, got {state[name]!r}. "
                    "Resume with a checkpoint that is as it was written."
                )
        self.epoch, self.batch = state["epoch"], state["batch"]
