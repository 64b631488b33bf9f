"""Negatives that are drawn, for evaluation and for training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.movielens.data.negatives import (
    draw_negatives,
    sample_training_pairs,
)
from maskmoe_kernels.experiments.movielens.data.reader import read_movielens
from maskmoe_kernels.experiments.movielens.data.split import leave_one_out
from maskmoe_kernels.experiments.movielens.data.tables import MovieLens
from tests.experiments.movielens.made import training_pairs, write_folder


@pytest.fixture
def data(tmp_path: Path) -> MovieLens:
    return read_movielens(write_folder(tmp_path / "tiny"))


def test_drawn_negatives_are_the_only_ones_possible(data: MovieLens) -> None:
    split = leave_one_out(data, seed=0)
    for seed in range(10):
        drawn = draw_negatives(data, split, seed, per_user=1)
        assert drawn[0].tolist() == [5]  # all else was rated by user 10, or by nobody
        assert drawn[1].item() in {3, 5}
        assert drawn[2].item() in {0, 2}


def test_drawn_negatives_are_distinct_and_uniform(tmp_path: Path) -> None:
    movies = "".join(f"{m}::M (2000)::War\n" for m in range(12)).encode()
    ratings = "".join(f"{7 + 3 * (m > 6)}::{m}::1::1\n" for m in range(11)) + "3::9::1::1\n"
    ratings += "3::10::1::1\n3::8::1::1\n"
    data = read_movielens(write_folder(tmp_path, movies=movies, ratings=ratings.encode()))
    split = leave_one_out(data, seed=0)
    count = torch.zeros(12)
    for seed in range(600):
        drawn = draw_negatives(data, split, seed, per_user=4)
        assert all(len(set(row)) == 4 for row in drawn.tolist())
        assert not split.interacted.gather(1, drawn).any()
        count += torch.bincount(drawn[2], minlength=12)
    assert count[8:].tolist() == [0, 0, 0, 0]  # rated by user 3, or by nobody
    # Each of 8 is drawn with probability 1/2: 300 times, with a deviation of 12.2.
    assert (count[:8] - 300).abs().max() < 5 * 12.2
    assert torch.equal(draw_negatives(data, split, 5, 4), draw_negatives(data, split, 5, 4))


def test_too_few_movies_to_draw_from(data: MovieLens) -> None:
    with pytest.raises(DataError, match=r"user 10 leaves 1 rated movies .* 2 negatives"):
        draw_negatives(data, leave_one_out(data, seed=0), seed=0, per_user=2)


def test_an_epoch_of_training_pairs(data: MovieLens) -> None:
    split = leave_one_out(data, seed=0)
    users, items, target = training_pairs(data, split, seed=1, ratio=300)
    assert target.dtype == torch.float32
    positive = target == 1
    assert sorted(zip(users[positive].tolist(), items[positive].tolist(), strict=True)) == sorted(
        zip(split.train_users.tolist(), split.train_items.tolist(), strict=True)
    )
    # 300 negatives for each positive, uniform over the rated movies outside training.
    for user in range(data.num_users):
        own = split.interacted_train[user]
        allowed = [i for i in data.rated_items.tolist() if not own[i]]
        draws = torch.bincount(items[~positive & (users == user)], minlength=data.num_items)
        total = 300 * int(own.sum())
        share = 1 / len(allowed)
        assert int(draws.sum()) == total == int(draws[allowed].sum())
        assert (draws[allowed] - total * share).abs().max() < 5 * (total * share) ** 0.5
        assert draws[split.test[user]] > 0  # held-out items are not given away by their absence


def test_epochs_are_shuffled_fresh_and_seeded(data: MovieLens) -> None:
    split = leave_one_out(data, seed=0)
    assert all(
        map(torch.equal, training_pairs(data, split, 3, 50), training_pairs(data, split, 3, 50))
    )
    generator = torch.Generator().manual_seed(3)
    taken, rated = split.interacted_train, data.rated_items
    first = sample_training_pairs(split, taken, rated, 50, generator=generator)
    second = sample_training_pairs(split, taken, rated, 50, generator=generator)
    assert all(map(torch.equal, first, training_pairs(data, split, 3, 50)))
    assert not torch.equal(first[1], second[1])
    place = first[2].nonzero().flatten()
    assert place.max() - place.min() > len(place)  # the positives do not stand together


def test_no_negative_exists(data: MovieLens) -> None:
    split = leave_one_out(data, seed=0)
    generator = torch.Generator().manual_seed(0)
    taken = split.interacted_train.clone()
    taken[1] = True
    with pytest.raises(ValueError, match=r"user row 1 has all 5 candidates"):
        sample_training_pairs(split, taken, data.rated_items, generator=generator)
    users, items, target = sample_training_pairs(
        split, taken, data.rated_items, 0, generator=generator
    )
    assert target.tolist() == [1.0] * len(split.train_users)
    assert sorted(items.tolist()) == sorted(split.train_items.tolist())
    assert sorted(users.tolist()) == sorted(split.train_users.tolist())
    with pytest.raises(ValueError, match=r"ratio must be at least 0, got -1"):
        sample_training_pairs(split, taken, data.rated_items, -1, generator=generator)
