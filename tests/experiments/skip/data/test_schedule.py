"""The batches of an epoch, and their shares."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from maskmoe_kernels.experiments.skip.data.schedule import Schedule
from maskmoe_kernels.experiments.skip.data.shards import Shards

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(
    sizes, st.integers(2, 30), st.integers(1, 6), st.none() | st.integers(0, 9),
    st.integers(0, 3), st.integers(1, 5), st.integers(1, 4),
)  # fmt: skip
def test_shares_divide_an_epoch(
    sizes: list[int], batch: int, pool: int, seed: int | None, epoch: int, world: int, workers: int
) -> None:
    schedule = Schedule(sizes, max(batch, 2 * world), pool, seed, epoch)
    seen: Counter[tuple[int, int]] = Counter()
    numbers = []
    for p in schedule.pools:
        numbers += range(p.first_batch, p.first_batch + p.batches)
        whole = schedule.shares(p, (0, 1), (0, 1))
        shares = [
            schedule.shares(p, (rank, world), (worker, workers))
            for rank in range(world)
            for worker in range(workers)
        ]
        assert {len(share) for share in shares} == {p.batches}  # every rank has equally many
        for k, sessions in enumerate(whole):
            joined = np.concatenate([share[k] for share in shares])
            assert joined.tolist() == sessions.tolist()  # whatever world and workers are
            assert len(sessions) <= schedule.batch_size
            ranks = [
                sum(len(shares[r * workers + w][k]) for w in range(workers)) for r in range(world)
            ]
            assert max(ranks) - min(ranks) <= 1
            assert min(ranks) > 0 or p.sessions < world
        assert max(map(len, whole)) - min(map(len, whole)) <= 1
        begin = np.cumsum(p.sizes) - p.sizes
        for session in np.concatenate(whole).tolist():
            group = int(np.searchsorted(begin, session, side="right")) - 1
            seen[int(p.groups[group]), session - int(begin[group])] += 1
    assert numbers == list(range(schedule.batches))
    assert seen == Counter((g, i) for g, size in enumerate(sizes) for i in range(size))


def test_batches_mix_the_row_groups_of_a_pool(shards: Shards) -> None:
    schedule = Schedule([500] * 8, 64, 8, 1, 0)
    (pool,) = schedule.pools
    for share in schedule.shares(pool, (0, 1), (0, 1)):
        assert len(np.unique(share // 500)) >= 6
        assert (np.diff(share // 500) >= 0).all()
