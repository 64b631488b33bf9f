"""The leave-one-out split, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.movielens.baselines import most_popular
from maskmoe_kernels.experiments.movielens.data.reader import read_movielens
from maskmoe_kernels.experiments.movielens.data.split import Split, leave_one_out
from maskmoe_kernels.experiments.movielens.data.tables import MovieLens
from tests.experiments.movielens.made import LINES, write_folder


@pytest.fixture
def data(tmp_path: Path) -> MovieLens:
    return read_movielens(write_folder(tmp_path / "tiny"))


def test_last_item_is_tested(data: MovieLens) -> None:
    split = leave_one_out(data, seed=0)
    # User 10: two items at the latest time, the lower one in the file; user 3: all at one time.
    assert split.test.tolist() == [3, 0, 1]


def test_split_is_a_partition(data: MovieLens) -> None:
    chosen: list[set[int]] = [set(), set(), set()]
    for seed in range(40):
        split = leave_one_out(data, seed)
        train = list(zip(split.train_users.tolist(), split.train_items.tolist(), strict=True))
        held = [*enumerate(split.validation.tolist()), *enumerate(split.test.tolist())]
        everything = list(zip(data.users.tolist(), data.items.tolist(), strict=True))
        assert sorted(train + held) == sorted(everything)
        assert train == [pair for pair in everything if pair in train]  # file order
        for user, item in enumerate(split.validation.tolist()):
            chosen[user].add(item)
    assert chosen == [{0, 1, 2}, {1, 2}, {3, 5}]  # every item but the last has its turn


def test_split_depends_on_the_seed_alone(data: MovieLens) -> None:
    first = [leave_one_out(data, seed).validation.tolist() for seed in range(8)]
    again = [leave_one_out(data, seed).validation.tolist() for seed in range(8)]
    assert first == again
    assert len({tuple(v) for v in first}) > 1


def test_interactions(data: MovieLens) -> None:
    split = leave_one_out(data, seed=0)
    rows = [set(row.nonzero().flatten().tolist()) for row in split.interacted]
    assert rows == [{0, 1, 2, 3}, {0, 1, 2}, {1, 3, 5}]
    for user, row in enumerate(split.interacted_train):
        held = {int(split.validation[user]), int(split.test[user])}
        assert set(row.nonzero().flatten().tolist()) == rows[user] - held


def test_user_with_two_ratings_cannot_be_split(tmp_path: Path) -> None:
    lines = [line for line in LINES["ratings.dat"] if line != "3::4::5::10"]
    data = read_movielens(write_folder(tmp_path, ratings=("\n".join(lines) + "\n").encode()))
    with pytest.raises(DataError, match=r"user 3 has 2 ratings .* at least 3"):
        leave_one_out(data, seed=0)


def test_most_popular_counts_all_but_the_test_items(data: MovieLens) -> None:
    held, test = torch.tensor([3, 4]), torch.tensor([5, 0])
    split = Split(torch.tensor([0, 1, 0]), torch.tensor([1, 1, 4]), held, test, data.num_items)
    assert most_popular(split, data.num_items).tolist() == [0, 2, 0, 1, 2, 0]
