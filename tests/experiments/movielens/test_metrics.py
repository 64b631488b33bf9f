"""Ranking metrics against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from maskmoe_kernels.experiments.movielens.metrics import hit_rate, leave_one_out_ranks, ndcg


def test_ranks_by_hand() -> None:
    positive = torch.tensor([0.9, 0.5, 0.0, float("inf")])
    negatives = torch.tensor(
        [[0.1, 0.2, 0.3], [0.7, 0.1, 0.6], [0.1, 0.2, 0.3], [1.0, 2.0, float("-inf")]]
    )
    assert leave_one_out_ranks(positive, negatives).tolist() == [1, 3, 4, 1]


def test_ties_count_against_the_positive() -> None:
    ranks = leave_one_out_ranks(torch.tensor([0.5, 0.5]), torch.tensor([[0.5, 0.1], [0.5, 0.7]]))
    assert ranks.tolist() == [2, 3]


def test_a_constant_scorer_cannot_win() -> None:
    ranks = leave_one_out_ranks(torch.zeros(4), torch.zeros(4, 99))
    assert ranks.tolist() == [100] * 4
    assert (hit_rate(ranks), ndcg(ranks)) == (0.0, 0.0)


def test_ignored_negatives_do_not_count() -> None:
    positive, negatives = torch.tensor([0.5, 0.5]), torch.tensor([[0.5, 0.9], [0.5, 0.9]])
    ignored = torch.tensor([[True, False], [False, True]])
    assert leave_one_out_ranks(positive, negatives).tolist() == [3, 3]
    assert leave_one_out_ranks(positive, negatives, ignored).tolist() == [2, 2]
    assert leave_one_out_ranks(positive, negatives, ignored | True).tolist() == [1, 1]


def test_no_negatives_is_rank_one() -> None:
    assert leave_one_out_ranks(torch.tensor([0.3]), torch.empty(1, 0)).tolist() == [1]


def test_hit_rate_by_hand() -> None:
    ranks = torch.tensor([1.0, 10.0, 11.0, 3.0])
    assert hit_rate(ranks) == 0.75
    assert hit_rate(ranks, k=1) == 0.25
    assert hit_rate(ranks, k=11) == 1.0


def test_ndcg_by_hand() -> None:
    ranks = torch.tensor([1.0, 3.0, 10.0, 11.0])
    # Gains 1 / log2(2), 1 / log2(4), 1 / log2(11), and none beyond the tenth.
    assert ndcg(ranks) == pytest.approx((1 + 0.5 + 1 / math.log2(11)) / 4, abs=1e-12)
    assert ndcg(ranks, k=3) == pytest.approx(1.5 / 4, abs=1e-12)
    assert ndcg(torch.tensor([7.0])) == pytest.approx(1 / 3, abs=1e-12)


@pytest.mark.parametrize("metric", [hit_rate, ndcg])
def test_metrics_refuse_what_are_no_ranks(metric: object) -> None:
    assert callable(metric)
    with pytest.raises(ValueError, match=r"ranks count from 1"):
        metric(torch.tensor([0.0, 2.0]))
    with pytest.raises(ValueError, match=r"ranks count from 1"):
        metric(torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match=r"at least one user, got \(0,\)"):
        metric(torch.empty(0))
    with pytest.raises(ValueError, match=r"at least one user, got \(2, 2\)"):
        metric(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"k must be at least 1, got 0"):
        metric(torch.ones(2), k=0)


def test_nan_has_no_rank() -> None:
    scores, nan = torch.zeros(3, 2), float("nan")
    with pytest.raises(ValueError, match=r"positive_score is NaN for user row 1"):
        leave_one_out_ranks(torch.tensor([0.0, nan, 0.0]), scores)
    scores[2, 1] = nan
    with pytest.raises(ValueError, match=r"negative_scores is NaN for user row 2"):
        leave_one_out_ranks(torch.zeros(3), scores)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"got \(3,\) and \(2, 4\)"):
        leave_one_out_ranks(torch.zeros(3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"got \(3, 1\) and \(3, 4\)"):
        leave_one_out_ranks(torch.zeros(3, 1), torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"expected ignored \(3, 4\) bool, got \(3,\)"):
        leave_one_out_ranks(torch.zeros(3), torch.zeros(3, 4), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"expected ignored \(3, 4\) bool, .*float32"):
        leave_one_out_ranks(torch.zeros(3), torch.zeros(3, 4), torch.zeros(3, 4))
