"""Every model learns, loads as it was, and runs in bfloat16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from maskmoe_kernels.experiments.skip.data.sessions import SessionDataset
from maskmoe_kernels.experiments.skip.data.shards import Shards
from maskmoe_kernels.experiments.skip.models import build, logits_of
from maskmoe_kernels.experiments.skip.runs import load
from maskmoe_kernels.experiments.skip.settings import MODELS
from maskmoe_kernels.experiments.skip.train import train
from tests.experiments.skip.tiny import PACE, TINY, draw_batch


@pytest.mark.parametrize("name", MODELS)
def test_every_model_learns_and_loads_as_it_was(name: str, data: Path, tmp_path: Path) -> None:
    settings = replace(TINY, model=name)
    model, run = train(data, tmp_path, settings, replace(PACE, epochs=3))
    losses = [record["train_loss"] for record in run.history]
    assert losses[2] < losses[0]
    loaded, same, again = load(tmp_path)
    assert same == settings
    assert again.best == run.best
    batch = draw_batch(4, 0)
    first, second = (logits_of(m, batch, settings) for m in (model, loaded))
    assert torch.equal(first, second)


def test_bfloat16_keeps_the_weights_and_comes_near(data: Path) -> None:
    batch = next(iter(SessionDataset(Shards(data, "train"), 16)))
    for name in MODELS:
        model = build(replace(TINY, model=name))
        exact = logits_of(model, batch, replace(TINY, model=name))
        near = logits_of(model, batch, replace(TINY, model=name, precision="bfloat16"))
        assert near.dtype == torch.float32
        real = ~batch.second_padding
        scale = exact[real].abs().mean()
        assert 0 < (near[real] - exact[real]).abs().mean() < 0.1 * scale
