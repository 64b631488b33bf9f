"""Metrics against values worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskmoe_kernels.experiments.shared.metrics import (
    SkipTally,
    hit_rate,
    leave_one_out_ranks,
    ndcg,
)


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


# --- Skips -------------------------------------------------------------------------------


def tally(*sessions: str, pad: Callable[[str, int, str], str] = str.ljust) -> dict[str, float]:
    """Metrics of sessions written as ``x`` for right, ``.`` for wrong; ``-`` is padding, right."""
    longest = max(map(len, sessions))
    padded = [pad(name, longest, "-") for name in sessions]
    right = torch.tensor([[c != "." for c in name] for name in padded])
    real = torch.tensor([[c != "-" for c in name] for name in padded])
    result = SkipTally()
    result.add(right, real)
    return result.metrics()


def test_skips_by_hand() -> None:
    # AA of "x.x": (1/1 + 0 + 2/3) / 3 = 5/9; of ".xx.x": (0 + 1/2 + 2/3 + 0 + 3/5) / 5 = 53/150.
    for pad in (str.ljust, str.rjust):  # padding after the tracks, or before them
        once = tally("x.x", pad=pad)
        assert once == pytest.approx({"Acc": 2 / 3, "Acc@1": 1, "MAA": 5 / 9}, rel=1e-12, abs=0)
        once = tally(".xx.x", pad=pad)
        assert once == pytest.approx({"Acc": 3 / 5, "Acc@1": 0, "MAA": 53 / 150}, rel=1e-12, abs=0)
    # Acc is over tracks, MAA over sessions, whatever their lengths.
    both = {"Acc": 5 / 8, "Acc@1": 1 / 2, "MAA": (5 / 9 + 53 / 150) / 2}
    for pad in (str.ljust, str.rjust):
        assert tally("x.x", ".xx.x", pad=pad) == pytest.approx(both, rel=1e-12, abs=0)
        assert tally("xxxxx", "x", pad=pad) == {"Acc": 1, "Acc@1": 1, "MAA": 1}
        assert tally("....", "..", pad=pad) == {"Acc": 0, "Acc@1": 0, "MAA": 0}
        assert tally("....", ".x", pad=pad)["Acc@1"] == 0
        assert tally("....", "x.", pad=pad)["Acc@1"] == 0.5
    assert tally("-x-.-x", "--x.x-") == pytest.approx(tally("x.x"), rel=1e-12, abs=0)  # anywhere
    # An early mistake costs more than a late one.
    assert tally(".xxxx")["MAA"] < tally("xxxx.")["MAA"]


def test_guessing_skips_gives_50_50_and_about_33() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 11, (200_000, 1), generator=generator)
    right = torch.rand(200_000, 10, generator=generator) < 0.5
    result = SkipTally()
    result.add(right, torch.arange(10) < lengths)
    # Where track j is right, half of the j - 1 before it are: E[AA] = 1/4 + (1 + ... + 1/T) / 4T.
    guessed = [0.25 + sum(1 / j for j in range(1, n + 1)) / (4 * n) for n in range(5, 11)]
    expected = {"Acc": 0.5, "Acc@1": 0.5, "MAA": sum(guessed) / 6}
    assert result.metrics() == pytest.approx(expected, abs=0.004)
    assert expected["MAA"] == pytest.approx(0.33, abs=0.015)


@given(st.lists(st.text("x.", min_size=1, max_size=10), min_size=2, max_size=8), st.data())
def test_sessions_may_be_counted_in_any_parts(sessions: list[str], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(sessions) - 1))
    whole = SkipTally()
    for part in (sessions[:cut], sessions[cut:]):
        right = torch.tensor([[c == "x" for c in name.ljust(10, ".")] for name in part])
        whole.add(right, torch.tensor([[k < len(name) for k in range(10)] for name in part]))
    means = [sum(name[: k + 1].count("x") / (k + 1) for k, c in enumerate(name) if c == "x")
             / len(name) for name in sessions]  # fmt: skip
    tracks = "".join(sessions)
    expected = {
        "Acc": tracks.count("x") / len(tracks),
        "Acc@1": sum(name[0] == "x" for name in sessions) / len(sessions),
        "MAA": sum(means) / len(sessions),
    }
    assert whole.metrics() == pytest.approx(expected, abs=1e-12)


def test_skips_of_another_shape_are_refused() -> None:
    right = torch.ones(2, 3, dtype=torch.bool)
    for real in (right[:, :2], right.float(), right[None]):
        with pytest.raises(ValueError, match=r"expected right and real \(B, T\) bool, got"):
            SkipTally().add(right, real)
    with pytest.raises(ValueError, match="no track was counted"):
        SkipTally().metrics()
