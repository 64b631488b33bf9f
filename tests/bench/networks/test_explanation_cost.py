"""The benchmark of explanations trains one function in two ways, and another by selection."""

from __future__ import annotations

import pytest
import torch

from bench.networks.explanation_cost import NOTES, SELECTION, family_of, trainer
from bench.networks.mlp_training import Data
from bench.networks.training import OURS, PAPER


def test_ours_and_paper_style_learn_the_same() -> None:
    family = family_of(3)
    data = Data(family.in_features, 32, torch.float32, "cpu")
    losses = {}
    for name in NOTES:
        made = trainer(name, family, 4, data)
        losses[name] = []
        for _ in range(3):
            before = float(made.total)
            made.train(1)
            losses[name].append(float(made.total) - before)
    assert losses[OURS] == pytest.approx(losses[PAPER], rel=1e-4, abs=0)
    assert losses[OURS] != pytest.approx(losses[SELECTION], rel=1e-2, abs=0)
    assert len(set(losses[OURS])) == 3
