"""MovieLens-1M itself, where it is beside the repository: its known figures."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

from maskmoe_kernels.experiments.movielens.baselines import most_popular
from maskmoe_kernels.experiments.movielens.data.fixed_negatives import read_fixed_negatives
from maskmoe_kernels.experiments.movielens.data.negatives import (
    draw_negatives,
)
from maskmoe_kernels.experiments.movielens.data.reader import read_movielens
from maskmoe_kernels.experiments.movielens.data.split import Split, leave_one_out
from maskmoe_kernels.experiments.movielens.data.tables import GENRES, MovieLens
from maskmoe_kernels.experiments.movielens.metrics import hit_rate, leave_one_out_ranks, ndcg
from tests.experiments.movielens.made import training_pairs


@pytest.fixture(scope="module")
def folder(shared_data: Path) -> Path:
    if not (shared_data / "ml-1m" / "ml-1m.zip").is_file():
        pytest.skip("MovieLens-1M may not be redistributed and is not beside this repository")
    return shared_data / "ml-1m"


@pytest.fixture(scope="module")
def real(folder: Path) -> MovieLens:
    return read_movielens(folder)


@pytest.fixture(scope="module")
def real_split(real: MovieLens) -> Split:
    return leave_one_out(real, seed=0)


def test_real_data_is_complete(real: MovieLens) -> None:
    assert (len(real.users), real.num_users, real.num_items) == (1_000_209, 6_040, 3_883)
    assert len(real.rated_items) == 3_706
    assert real.titles[0] == "Toy Story (1995)"
    assert int(real.sex.sum()) == 4_331  # the official counts: 4,331 men and 1,709 women
    assert (int(real.year.min()), int(real.year.max())) == (1919, 2000)
    assert int(real.genres[:, GENRES.index("Drama")].sum()) == 1_603


def test_most_popular_has_its_known_figures(
    folder: Path, real: MovieLens, real_split: Split
) -> None:
    negatives = read_fixed_negatives(folder / "ncf-test-negatives.tsv.gz", real, real_split)
    own_positive = negatives == real_split.test[:, None]
    assert int(own_positive.any(1).sum()) == 156
    assert not (real_split.interacted.gather(1, negatives) & ~own_positive).any()
    score = most_popular(real_split, real.num_items)
    ranks = leave_one_out_ranks(score[real_split.test], score[negatives], own_positive)
    assert hit_rate(ranks) == pytest.approx(0.453, abs=0.0005)
    assert ndcg(ranks) == pytest.approx(0.254, abs=0.0005)


def test_the_authors_numbering_of_the_same_negatives(
    folder: Path, real: MovieLens, real_split: Split, tmp_path: Path
) -> None:
    """The negatives as the authors number them, where ratings.dat is in the order of this copy."""
    movies: dict[str, int] = {}
    for row in real.items.tolist():
        movies.setdefault(str(int(real.movie_ids[row])), len(movies))
    lines = []
    packed = (folder / "ncf-test-negatives.tsv.gz").read_bytes()
    for line in gzip.decompress(packed).decode().splitlines():
        head, *negatives = line.split("\t")
        user, positive = head[1:-1].split(",")
        numbers = [movies[name] for name in negatives]
        lines.append("\t".join([f"({int(user) - 1},{movies[positive]})", *map(str, numbers)]))
    path = tmp_path / "ml-1m.test.negative"
    path.write_text("\n".join(lines) + "\n")
    published = read_fixed_negatives(folder / "ncf-test-negatives.tsv.gz", real, real_split)
    assert torch.equal(read_fixed_negatives(path, real, real_split), published)


def test_real_training_epoch(real: MovieLens, real_split: Split) -> None:
    users, items, target = training_pairs(real, real_split, seed=0, ratio=4)
    positive = target == 1
    assert int(positive.sum()) == len(real_split.train_users) == 1_000_209 - 2 * 6_040
    assert len(target) == 5 * int(positive.sum())
    assert torch.equal(real_split.interacted_train[users, items], positive)


def test_real_drawn_negatives(real: MovieLens, real_split: Split) -> None:
    drawn = draw_negatives(real, real_split, seed=0)
    assert drawn.shape == (6_040, 99)
    assert (drawn.sort(1).values.diff(dim=1) > 0).all()
    assert not real_split.interacted.gather(1, drawn).any()
    assert torch.isin(drawn, real.rated_items).all()
