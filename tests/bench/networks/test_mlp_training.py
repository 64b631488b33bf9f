"""The benchmark of whole networks trains one function in three ways, and counts what it moves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench.networks import mlp_training
from bench.networks.mlp_training import LAYERED, NAMES, NOTES, SMOKE, count, run, subject
from bench.networks.training import BLACK_BOX, OURS, PAPER, Trainer
from maskmoe_kernels import InterpretableMLP, SubsetFamily
from maskmoe_kernels.models import NCFSizes

SIZES = NCFSizes(num_users=20, num_items=10)
SCHEDULE = replace(SMOKE, sizes=SIZES, seconds=0.005)


def trainer(network: str, name: str, dtype: torch.dtype = torch.float32) -> Trainer:
    return subject(network, dtype).prepare(32, SCHEDULE, "cpu")(name, False)


@pytest.mark.parametrize("network", NAMES)
def test_three_ways_to_train_one_function(network: str) -> None:
    losses = {}
    for name in (OURS, LAYERED, PAPER):
        made = trainer(network, name)
        losses[name] = []
        for _ in range(3):
            before = float(made.total)
            made.train(1)
            losses[name].append(float(made.total) - before)
    assert losses[OURS] == pytest.approx(losses[LAYERED], rel=1e-4)
    assert losses[OURS] == pytest.approx(losses[PAPER], rel=1e-4)
    assert len(set(losses[OURS])) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NOTES)
def test_training_moves_the_parameters(name: str, dtype: torch.dtype) -> None:
    for network in ("toy", "movielens"):
        made = trainer(network, name, dtype)
        before = [p.detach().clone() for p in made.model.parameters()]
        made.train(3)
        after = [*made.model.parameters()]
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert all(p.dtype == dtype and p.isfinite().all() for p in after)


@pytest.mark.parametrize("network", NAMES)
def test_the_black_box_is_as_wide(network: str) -> None:
    ours, box = (trainer(network, name).model for name in (OURS, BLACK_BOX))
    net = ours.experts if network == "movielens" else ours
    widths = [layer.out_features for layer in net.layers[:-1]]
    dense = [m.out_features for m in box.modules() if isinstance(m, torch.nn.Linear)]
    assert [w for w in dense if w in widths][: len(widths)] == widths


def test_counts_by_hand() -> None:
    family = SubsetFamily({"a": 3, "b": 2}, {"a": ["a"], "ab": ["a", "b"]})
    found = count(InterpretableMLP(family, [4]), batch=10, size=4)
    weights = (3 * 4 + 5 * 4 + 8) + (4 + 8 + 2)  # experts a and ab: weights, then biases, twice
    routed = 4 + 4
    assert found.flops == 2 * 10 * (2 * weights + routed)
    once = 10 * 5 + 10 + 2 * weights
    assert found.bytes == 4 * once
    assert found.bytes_layered == 4 * (once + 5 * 10 * (8 + 2))


def test_a_run_writes_ratios_and_bounds(tmp_path: Path) -> None:
    found = run(
        replace(SCHEDULE, batches=(16,)),
        tmp_path,
        Console(quiet=True),
        "cpu",
        ("toy",),
        ("float32",),
    )
    assert json.loads((tmp_path / mlp_training.FILE).read_text()) == found
    assert [r["model"] for r in found["results"]] == [*NOTES]
    assert {r["to"] for r in found["ratios"]} == {LAYERED, BLACK_BOX, PAPER}
    (bound,) = found["bounds"]
    assert 0 < bound["bytes_us"] < bound["bytes_layered_us"]
