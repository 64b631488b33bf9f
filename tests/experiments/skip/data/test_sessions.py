"""The stream of sessions: each session comes once, and the cursor resumes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.skip.data.features import (
    SKIP_2,
    SessionBatch,
)
from maskmoe_kernels.experiments.skip.data.prepare import prepare
from maskmoe_kernels.experiments.skip.data.sessions import SessionDataset, SessionLoader
from maskmoe_kernels.experiments.skip.data.shards import Shards
from tests.experiments.skip.data.batches import assert_equal, assert_same_batches, loader


# Each example reads the shards up to six times; the schedule alone is tested above.
@settings(max_examples=20)
@given(st.integers(2, 70), st.integers(1, 10), st.integers(0, 5), st.integers(0, 4), st.data())
def test_every_session_once_over_ranks_from_any_point(
    shards: Shards, batch: int, pool: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    world = data.draw(st.integers(1, batch // 2))
    ranks = [
        loader(shards, batch, pool=pool, seed=seed, rank=rank, world=world)
        for rank in range(min(world, 4))
    ]
    one = loader(shards, batch, pool=pool, seed=seed)
    one.epoch = epoch
    whole = list(one)
    start = data.draw(st.integers(0, len(whole)))
    state = {**one.state_dict(), "epoch": epoch, "batch": start}
    ids = [name for b in whole for name in b.session_ids]
    assert len(ids) == len(set(ids)) == len(shards)
    parts = []
    for rank in ranks:
        rank.load_state_dict(state)
        parts.append(list(rank))
        assert (rank.epoch, rank.batch) == (epoch + 1, 0)
    assert {len(part) for part in parts} == {len(whole) - start}
    for k, expected in enumerate(whole[start:]):
        joined = SessionBatch.join([part[k] for part in parts])
        if len(ranks) == world:
            assert_equal(joined, expected)
        else:
            assert joined.session_ids == expected.session_ids[: len(joined)]


def test_epochs_and_seeds_have_other_orders(shards: Shards) -> None:
    def order(seed: int | None, epoch: int) -> list[str]:
        it = loader(shards, seed=seed)
        it.epoch = epoch
        return [name for batch in it for name in batch.session_ids]

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert orders[0] == order(0, 0)
    assert order(None, 0) == order(None, 1)
    # In file order, where no seed shuffles.
    table = pa.concat_tables([shards.table(g) for g in range(len(shards.sizes))])
    first = table.filter(pa.compute.equal(table["session_position"], 1))
    assert order(None, 0) == first["session_id"].to_pylist()


def test_a_share_decodes_only_the_row_groups_it_touches(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    table = Shards.table

    def note(self: Shards, group: int, *args: object) -> object:
        read.append(group)
        return table(self, group, *args)

    monkeypatch.setattr(Shards, "table", note)
    whole = len(shards.sizes)
    list(SessionDataset(shards, 64, pool=whole, seed=None))
    assert sorted(read) == list(range(whole))
    read.clear()
    list(SessionDataset(shards, 64, pool=whole, seed=3, rank=0, world=4))
    assert len(read) == len(set(read)) <= -(-whole // 4) + 1


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_equals_not_having_stopped(shards: Shards, workers: int) -> None:
    straight = loader(shards, workers=workers)
    first, second = list(straight), list(straight)
    for stop in (0, 1, len(first) - 1, len(first), len(first) + 2):
        run, got = loader(shards, workers=workers), []
        passes: Iterator[SessionBatch] = (batch for _ in range(2) for batch in run)
        got += islice(passes, stop)
        state = json.loads(json.dumps(run.state_dict()))  # of plain values
        assert state["epoch"] * len(first) + state["batch"] == stop
        again = loader(shards, workers=2 - workers)  # the number of workers may change
        again.load_state_dict(state)
        while again.epoch < 2:
            got += again
        assert_same_batches(got, first + second)


def test_a_pass_leaves_the_random_state_alone(shards: Shards) -> None:
    state = torch.get_rng_state()
    next(iter(loader(shards)))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_pass_that_is_left_goes_on(shards: Shards) -> None:
    straight, run = loader(shards), loader(shards)
    got = []
    while run.epoch == 0:
        got += islice(run, 3)
    assert_same_batches(got, list(straight))
    assert len(run) == len(list(run))


@pytest.mark.parametrize(
    ("name", "value"),
    [("digest", "0"), ("split", "test"), ("batch_size", 8), ("pool", 9), ("seed", 1)],
)
def test_a_cursor_of_another_stream_is_refused(shards: Shards, name: str, value: object) -> None:
    run = loader(shards)
    before = run.state_dict()
    with pytest.raises(DataError, match=rf"cursor: expected {name} .* got {value!r}\. Resume"):
        run.load_state_dict({**before, "batch": 3, name: value})
    with pytest.raises(DataError, match=rf"got no \['{name}'\]"):
        run.load_state_dict({key: v for key, v in before.items() if key != name})
    assert run.state_dict() == before


def test_bad_arguments(shards: Shards) -> None:
    for kwargs, message in (
        ({"batch_size": 0}, "at least 2 for each of 1, got 0"),
        ({"batch_size": 7, "world": 4}, "at least 2 for each of 4, got 7"),
        ({"rank": 2, "world": 2}, r"one of 0\.\.1 \(world 2\), got 2"),
        ({"pool": 0}, "pool must be at least 1"),
        ({"seed": -1}, "seed at least 0, got 3 and -1"),
    ):
        with pytest.raises(ValueError, match=message):
            loader(shards, **kwargs)


def test_real_sessions(shared_data: Path, tmp_path: Path) -> None:
    prepare([shared_data / "mssd-sample"], tmp_path, strict=True)
    skips = tracks = 0
    for split in ("train", "valid", "test"):
        for batch in SessionLoader(SessionDataset(Shards(tmp_path, split), 4, seed=0)):
            assert torch.isfinite(batch.first).all()
            skips += int(batch.target.sum() + batch.first[..., SKIP_2].sum())
            tracks += int((~batch.first_padding).sum() + (~batch.second_padding).sum())
    assert (skips, tracks) == (82, 201)
