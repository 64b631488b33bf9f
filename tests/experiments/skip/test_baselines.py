"""Baselines of skip prediction, by hand."""

from __future__ import annotations

import pytest
import torch

from maskmoe_kernels.experiments.skip.baselines import last_skip, mean_skip


def test_baselines_by_hand() -> None:
    skips = torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]])
    padding = torch.arange(4) >= torch.tensor([[3], [4], [0]])
    assert last_skip(skips, padding).tolist() == [[1], [1], [0.5]]
    means = [[2 / 3], [3 / 4], [0.5]]
    assert mean_skip(skips, padding) == pytest.approx(torch.tensor(means), abs=1e-6)
