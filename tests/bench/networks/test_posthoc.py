"""Contributions as shares of the cause, and how often these name it."""

from __future__ import annotations

import pytest
import torch

from bench.networks import posthoc
from maskmoe_kernels.experiments.toy.data import TASKS


def test_one_contribution_is_one_cause_and_equal_ones_are_both() -> None:
    values = torch.tensor([[2.0, 0.0], [0.0, -3.0], [1.0, -1.0], [-3.0, 1.0], [0.0, 0.0]])
    expected = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0, 0.5], [0, 0, 1]]
    torch.testing.assert_close(posthoc.shares_of(values), torch.tensor(expected).float())


def test_agreement_counts_the_cause_with_and_without_a_threshold() -> None:
    shares = torch.tensor([[0.4, 0.0, 0.6], [0.0, 0.9, 0.1], [0.3, 0.0, 0.7], [0.7, 0.0, 0.3]])
    own = torch.tensor([0, 1, 2, 2])
    inner = torch.tensor([True, True, False, False])
    found = posthoc._agreement(shares, own, inner)
    # At 0.35 the first two have their input, and the third has both; at 0.5 the first has both.
    assert found == pytest.approx(
        {"inner": 0.5, "outer": 0.5, "best_inner": 1.0, "best_outer": 0.5}, rel=1e-6, abs=0
    )


def test_the_known_cause_is_that_of_the_nearest_cluster() -> None:
    points = torch.tensor([[-1.1, 0.1], [0.1, 1.2], [2.0, -1.9]])
    assert posthoc._known(TASKS["b"], points).tolist() == [0, 1, 2]
