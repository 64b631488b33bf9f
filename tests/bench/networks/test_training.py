"""The training benchmark trains what the experiment trains."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench.networks import training
from bench.networks.training import BLACK_BOX, NOTES, OURS, PAPER, SMOKE, Data, Trainer
from maskmoe_kernels.experiments.movielens.data.ranking import Features
from maskmoe_kernels.models import NCFSizes

SIZES = NCFSizes(num_users=20, num_items=10)


def test_models_start_and_train_alike() -> None:
    """Ours and the paper's list of layers are one function: losses stay equal for some steps."""
    losses = {}
    for name in (OURS, PAPER):
        trainer = Trainer(name, Data(SIZES, 32, "cpu"), SIZES, "cpu")
        losses[name] = []
        for _ in range(4):
            before = float(trainer.total)
            trainer.train(1)
            losses[name].append(float(trainer.total) - before)
    assert losses[OURS] == pytest.approx(losses[PAPER], rel=1e-4)
    assert len(set(losses[OURS])) == 4


@pytest.mark.parametrize("name", NOTES)
def test_training_moves_every_parameter(name: str) -> None:
    trainer = Trainer(name, Data(SIZES, 64, "cpu"), SIZES, "cpu")
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train(2)
    for old, new in zip(before, trainer.model.parameters(), strict=True):
        assert not torch.equal(old, new)
    assert trainer.done == 2


def test_data_has_the_shapes_of_the_experiment() -> None:
    data = Data(SIZES, 8, "cpu", steps=3)
    seen = Features.__new__(Features)
    seen.codes, seen.numeric = data.codes, data.numeric
    users, items, target = data.step(4)  # the second step, over again
    assert torch.equal(users, data.step(1)[0])
    assert not torch.equal(users, data.step(2)[0])
    assert set(target.tolist()) <= {0.0, 1.0}
    for name in NOTES:
        model = training.build(name, SIZES)
        logits = seen.logits(model, users, items)
        assert logits.shape == (8, 1 if name == BLACK_BOX else 4)


def test_a_run_writes_medians_and_ratios(tmp_path: Path) -> None:
    plan = replace(SMOKE, sizes=SIZES, batches=(8, 16), seconds=0.005)
    document = training.run(plan, tmp_path, "cpu", Console(quiet=True))
    assert json.loads((tmp_path / training.NAME).read_text("utf-8")) == document
    assert [(r["batch"], r["model"]) for r in document["results"]] == [
        (batch, name) for batch in (8, 16) for name in NOTES
    ]
    for record in document["results"]:
        assert 0 < record["q25"] <= record["samples_per_s"] <= record["q75"]
        assert record["rounds"] == plan.rounds
    rate = {r["model"]: r["samples_per_s"] for r in document["results"] if r["batch"] == 8}
    ratios = {r["to"]: r["ratio"] for r in document["ratios"] if r["batch"] == 8}
    assert ratios == {
        BLACK_BOX: pytest.approx(rate[OURS] / rate[BLACK_BOX]),
        PAPER: pytest.approx(rate[OURS] / rate[PAPER]),
    }


def test_what_is_reported_is_the_median() -> None:
    class Told:
        steps = 3
        model = torch.nn.Linear(2, 1)

        def __init__(self) -> None:
            self.samples: list[float] = []
            self.rates = iter([100.0, 1.0, 8.0, 2.0, 4.0])

        def warm_up(self, seconds: float) -> None:
            pass

        def sample(self) -> float:
            return next(self.rates)

    subject = replace(
        training.SUBJECT,
        notes={OURS: ""},
        prepare=lambda batch, plan, device: lambda name, compiled: Told(),  # type: ignore[arg-type, return-value]
    )
    (record,) = training.measure(8, replace(SMOKE, rounds=5, compile=False), "cpu", subject)
    assert [record[name] for name in ("q25", "samples_per_s", "q75")] == [2, 4, 8]
    assert (record["rounds"], record["steps_a_sample"], record["parameters"]) == (5, 3, 3)


def test_a_model_that_fails_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = training.build

    def failing(name: str, sizes: NCFSizes) -> torch.nn.Module:
        if name == PAPER:
            raise RuntimeError("cannot\nbuild")
        return build(name, sizes)

    monkeypatch.setattr(training, "build", failing)
    plan = replace(SMOKE, sizes=SIZES, batches=(8,), seconds=0.005)
    document = training.run(plan, tmp_path, "cpu", Console(quiet=True))
    records = {r["model"]: r for r in document["results"]}
    assert records[PAPER]["unavailable"] == "RuntimeError: cannot build"
    assert [r["to"] for r in document["ratios"]] == [BLACK_BOX]
