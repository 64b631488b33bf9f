"""The benchmark of the skip models trains what the experiment trains."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench.command import main
from bench.networks import skip_training, training
from bench.networks.skip_training import SETTINGS, SUBJECT, Data, trainer
from bench.networks.training import BLACK_BOX, OURS
from maskmoe_kernels.models import InterpretableTransformer, Transformer


def test_the_models_are_the_papers() -> None:
    ours, rival = (skip_training.build(SETTINGS[name]) for name in (OURS, BLACK_BOX))
    assert isinstance(ours, InterpretableTransformer)
    assert isinstance(rival, Transformer)
    assert ours.head.in_features == rival.head.in_features == 128
    assert all(type(m).__module__.startswith("torch.") for m in rival.children())


@pytest.mark.parametrize("name", [OURS, BLACK_BOX])
def test_training_moves_every_parameter(name: str) -> None:
    data = Data(6, "cpu", steps=2)
    made = trainer(name, data, "cpu", False)
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    made.train(3)
    moved = [n for n, p in made.model.named_parameters() if not torch.equal(before[n], p)]
    assert len(moved) == len(before)
    assert made.done == 3


def test_sessions_are_padded_as_the_stream_pads_them() -> None:
    first, second, target, first_padding, second_padding = Data(50, "cpu", steps=1).step(7)
    lengths = [(~p).sum(1) for p in (first_padding, second_padding)]
    assert ((lengths[1] - lengths[0]) | 1 == 1).all()  # B has as many tracks, or one more
    assert set((lengths[0] + lengths[1]).tolist()) == set(range(10, 21))
    for half, padding in ((first, first_padding), (second, second_padding)):
        assert (half[padding] == 0).all()
        assert (half[~padding] != 0).any(1).all()
    assert (target[second_padding] == 0).all()
    assert target[~second_padding].mean() == pytest.approx(0.5, abs=0.1)


def test_a_run_writes_medians_and_the_ratio(tmp_path: Path) -> None:
    schedule = replace(skip_training.SMOKE, seconds=0.005)
    document = training.run(SUBJECT, schedule, tmp_path, "cpu", Console(quiet=True))
    assert json.loads((tmp_path / "skip_training.json").read_text("utf-8")) == document
    rate = {r["model"]: r["samples_per_s"] for r in document["results"]}
    (ratio,) = document["ratios"]
    assert ratio["to"] == BLACK_BOX
    assert ratio["ratio"] == pytest.approx(rate[OURS] / rate[BLACK_BOX])


def test_the_command_takes_the_model(tmp_path: Path) -> None:
    words = ["train", "--model", "skip", "--smoke", "--out", str(tmp_path)]
    assert main(words, Console(quiet=True)) == 0
    assert (tmp_path / "skip_training.json").exists()
