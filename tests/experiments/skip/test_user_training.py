"""Training with embeddings of users: by rows, resumed bit for bit, in several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from maskmoe_kernels.experiments.shared.trainer import Trainer
from maskmoe_kernels.experiments.skip import models
from maskmoe_kernels.experiments.skip.data.prepare import prepare
from maskmoe_kernels.experiments.skip.data.shards import Shards
from maskmoe_kernels.experiments.skip.models import build
from maskmoe_kernels.experiments.skip.pace import Pace
from maskmoe_kernels.experiments.skip.runs import load
from maskmoe_kernels.experiments.skip.schema.parse import parse_schema
from maskmoe_kernels.experiments.skip.settings import MODELS, Settings
from maskmoe_kernels.experiments.skip.train import Means, train
from tests.experiments.skip.logs import TEXT, draw_events, write_log
from tests.experiments.skip.skip_sessions import ROOT

pytest.importorskip("duckdb")
SETTINGS = Settings(MODELS[1], width=3, layers=1, batch_size=8)
PACE = Pace(epochs=2, learning_rate=1e-2, save_every=2)


@pytest.fixture(autouse=True)
def _few_users_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "SPARSE_FROM", 1)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sessions of 50 users, so that a batch holds few of them."""
    folder = tmp_path_factory.mktemp("users")
    schema = parse_schema(TEXT.replace("shortest = 2", "shortest = 2\nslice = 6"))
    events = draw_events(600, users=50)
    prepare([write_log(folder / "log", events)], folder / "out", schema, row_group=16)
    return folder / "out"


def checkpoint(out: Path) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(out / "checkpoint.pt", weights_only=True)
    return saved


def assert_same_run(one: dict[str, Any], other: dict[str, Any]) -> None:
    for found, expected in (
        (one["model"], other["model"]),
        (one["best"]["model"], other["best"]["model"]),
        *(
            (state, other["optimizer"]["state"][key])
            for key, state in one["optimizer"]["state"].items()
        ),
    ):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


class Stop(Exception):
    pass


@pytest.mark.parametrize("embeddings", ["shared", "strict"])
@pytest.mark.parametrize("model", MODELS[:2])
def test_a_stopped_run_ends_with_the_same_bits(
    log: Path, tmp_path: Path, model: str, embeddings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, model=model, embeddings=embeddings)
    train(log, tmp_path / "whole", settings, PACE)
    step, left = Trainer._step, 0

    def stopping(self: Trainer[Any], batch: Any) -> None:
        nonlocal left
        step(self, batch)
        left -= 1
        if left == 0:
            raise Stop

    monkeypatch.setattr(Trainer, "_step", stopping)
    for k, stop in enumerate((3, 2, 5)):
        left = stop
        torch.manual_seed(100 + k)
        with pytest.raises(Stop):
            train(log, tmp_path / "stopped", settings, PACE, Means(resume=True))
        if k == 0:  # rows are behind in it
            state = checkpoint(tmp_path / "stopped")["optimizer"]["state"][0]
            assert state["row_step"].unique().numel() > 1
    train(log, tmp_path / "stopped", settings, PACE, Means(resume=True))
    assert_same_run(checkpoint(tmp_path / "stopped"), checkpoint(tmp_path / "whole"))
    best = load(tmp_path / "whole")[0].state_dict()
    assert best["users.table.weight"].isfinite().all()


@pytest.mark.parametrize("model", MODELS)
def test_the_weights_are_those_of_dense_gradients(
    log: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, shards = replace(SETTINGS, model=model), Shards(log, "train")
    start = build(settings, shards.schema, shards.embedded).state_dict()
    sparse, _ = train(log, tmp_path / "sparse", settings, PACE)
    monkeypatch.setattr(models, "SPARSE_FROM", 10**9)
    dense, _ = train(log, tmp_path / "dense", settings, PACE)
    assert sparse.users is not None
    assert dense.users is not None
    assert (sparse.users.table.sparse, dense.users.table.sparse) == (True, False)
    expected, found = (checkpoint(tmp_path / n)["model"] for n in ("dense", "sparse"))
    # All weights at once: gradients of biases that should be 0 are rounding, which Adam enlarges.
    for names in (["users.table.weight"], list(expected)):
        far, moved = (
            torch.cat([(other[n] - expected[n]).flatten() for n in names]).norm()
            for other in (found, start)
        )
        assert far <= 1e-3 * moved


def test_users_without_sessions_in_training_share_a_row_that_is_trained(
    log: Path, tmp_path: Path
) -> None:
    shards = Shards(log, "train")
    model, _ = train(log, tmp_path, SETTINGS, replace(PACE, epochs=4, save_every=None))
    assert model.users is not None
    start = build(SETTINGS, shards.schema, shards.embedded).users
    assert start is not None
    moved = (model.users.table.weight - start.table.weight).abs().amax(1)
    assert shards.users is not None
    known = torch.from_numpy(shards.users[1].copy())
    assert moved[0] > 1e-3  # the row of all unknown users
    assert (moved[1:][~known] == 0).all()  # nobody reads theirs
    assert (moved[1:][known] > 1e-4).float().mean() > 0.9
    assert not known.all()


_RANK = """
import sys
from pathlib import Path
import torch
from maskmoe_kernels.experiments.shared.ranks import joined
from maskmoe_kernels.experiments.skip import models
from maskmoe_kernels.experiments.skip.train import train
from tests.experiments.skip.test_user_training import PACE, SETTINGS
models.SPARSE_FROM = 1
torch.set_num_threads(1)
data, out = map(Path, sys.argv[1:])
with joined() as ranks:
    model, _ = train(data, out, SETTINGS, PACE, ranks=ranks)
    assert model.users.table.sparse
    torch.save(model.state_dict(), out / f"rank{ranks.rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_train_as_one(log: Path, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(_RANK)
    (tmp_path / "two").mkdir()
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [sys.executable, *words, str(tmp_path / "rank.py"), str(log), str(tmp_path / "two")],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=200, check=True,
    )  # fmt: skip
    one, _ = train(log, tmp_path / "one", SETTINGS, PACE)
    ranks = [torch.load(tmp_path / "two" / f"rank{k}.pt") for k in (0, 1)]
    shards = Shards(log, "train")
    start = build(SETTINGS, shards.schema, shards.embedded).state_dict()
    for name, expected in one.state_dict().items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        moved = (expected - start[name]).norm()
        assert (ranks[0][name] - expected).norm() <= 0.02 * moved + 1e-7, name
