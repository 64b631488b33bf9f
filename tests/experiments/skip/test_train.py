"""Training on sessions: resuming bit for bit, several processes, wrong settings."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from maskmoe_kernels.cli import main
from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.trainer import Trainer
from maskmoe_kernels.experiments.skip.data.features import SessionBatch
from maskmoe_kernels.experiments.skip.data.sessions import SessionDataset, SessionLoader
from maskmoe_kernels.experiments.skip.data.shards import Shards
from maskmoe_kernels.experiments.skip.models import build
from maskmoe_kernels.experiments.skip.pace import Pace
from maskmoe_kernels.experiments.skip.runs import load
from maskmoe_kernels.experiments.skip.settings import MODELS
from maskmoe_kernels.experiments.skip.train import Means, train
from tests.experiments.skip.skip_sessions import command, write_sessions
from tests.experiments.skip.tiny import PACE, TINY


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The last checkpoint of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("undisturbed")
    train(data, out, TINY, PACE)
    return checkpoint(out)


def checkpoint(out: Path) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(out / "checkpoint.pt", weights_only=True)
    return saved


def assert_same_run(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Weights, optimiser, best weights, curves: bit for bit; times are their own."""
    for found, expected in (
        (one["model"], other["model"]),
        (one["best"]["model"], other["best"]["model"]),
    ):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    for key, state in one["optimizer"]["state"].items():
        assert all(torch.equal(state[n], other["optimizer"]["state"][key][n]) for n in state)
    assert one["scheduler"] == other["scheduler"]
    assert one["cursor"] == other["cursor"]
    curves = [[{**r, "sessions_per_s": 0} for r in run["history"]] for run in (one, other)]
    assert curves[0] == curves[1]


RESUME = Means(resume=True)


class Stop(Exception):
    pass


@pytest.mark.parametrize("stops", [(1,), (2, 2), (5, 6), (7, 1, 1, 3), (10,)], ids=str)
def test_interrupted_runs_end_as_an_undisturbed_one(
    stops: tuple[int, ...],
    data: Path,
    tmp_path: Path,
    undisturbed: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = Trainer._step
    left = 0

    def stopping(self: Trainer, batch: SessionBatch) -> None:
        nonlocal left
        step(self, batch)
        left -= 1
        if left == 0:
            raise Stop

    monkeypatch.setattr(Trainer, "_step", stopping)
    for k, stop in enumerate(stops):
        left = stop
        torch.manual_seed(100 + k)  # what the process drew meanwhile means nothing
        with pytest.raises(Stop):
            train(data, tmp_path, TINY, PACE, RESUME)
    train(data, tmp_path, TINY, PACE, RESUME)
    assert_same_run(checkpoint(tmp_path), undisturbed)


@pytest.fixture
def _threads_stay() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("_threads_stay")
def test_killed_runs_end_as_an_undisturbed_one(data: Path, tmp_path: Path) -> None:
    words = ["skip", "train", "--data", str(data), "--batch", "48", "--width", "3"]
    words += ["--layers", "1", "--epochs", "2", "--lr", "1e-3", "--save-every", "2", "--threads"]
    whole, killed = ([*words, "1", "--out", str(tmp_path / name)] for name in ("whole", "killed"))
    assert main(whole) == 0
    # Half-way through writing the third checkpoint; then between two others.
    assert command(killed, "save:3") == -signal.SIGKILL
    assert len(list((tmp_path / "killed").glob(".unfinished-*"))) == 1
    killed.append("--resume")
    assert command(killed, "step:3") == -signal.SIGKILL
    assert main(killed) == 0
    assert_same_run(checkpoint(tmp_path / "killed"), checkpoint(tmp_path / "whole"))
    left = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert left == ["checkpoint.pt", "learning_curves.png", "report.json"]


def test_epochs_of_so_many_steps_go_on_through_the_data(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    step = Trainer._step

    def noting(self: Trainer, batch: SessionBatch) -> None:
        seen.extend(batch.session_ids)
        step(self, batch)

    monkeypatch.setattr(Trainer, "_step", noting)
    _, run = train(data, tmp_path, TINY, replace(PACE, steps=4, epochs=3, save_every=3))
    assert [record["epoch"] for record in run.history] == [1, 2, 3]
    dataset = SessionDataset(Shards(data, "train"), TINY.batch_size, seed=TINY.seed)
    loader = SessionLoader(dataset)
    expected = [name for _ in range(3) for batch in loader for name in batch.session_ids]
    assert len(dataset.shards) < len(seen) < 3 * len(dataset.shards)
    assert seen == expected[: len(seen)]


def test_more_epochs_go_on_where_fewer_ended(data: Path, tmp_path: Path) -> None:
    short, whole = tmp_path / "short", tmp_path / "whole"
    train(data, short, TINY, replace(PACE, epochs=1))
    train(data, short, TINY, replace(PACE, epochs=3), RESUME)
    (short / "report.json").unlink()
    train(data, short, TINY, replace(PACE, epochs=3), RESUME)
    assert len(json.loads((short / "report.json").read_text())["history"]) == 3
    train(data, whole, TINY, replace(PACE, epochs=3))
    assert_same_run(checkpoint(short), checkpoint(whole))


def test_another_setting_or_other_data_is_an_error(
    data: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    once = replace(PACE, epochs=1)
    train(data, tmp_path, TINY, once)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    for change in ({"width": 4}, {"model": MODELS[2]}, {"normalize": "none"}, {"seed": 1}):
        name = next(iter(change))
        with pytest.raises(DataError, match=rf"trained with {name}=.*--out folder"):
            train(data, tmp_path, replace(TINY, **change), once, RESUME)
    with pytest.raises(DataError, match=r"trained with learning_rate=0\.001, this run has 0\.1"):
        train(data, tmp_path, TINY, replace(once, learning_rate=0.1), RESUME)
    others = write_sessions(tmp_path_factory.mktemp("others"), 200)[1]
    with pytest.raises(DataError, match="trained with data="):
        train(others, tmp_path, TINY, once, RESUME)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    train(data, tmp_path, replace(TINY, width=4), once, Means(resume=False))
    assert load(tmp_path)[1].width == 4


def test_a_damaged_checkpoint_is_an_error(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path, TINY, replace(PACE, epochs=1))
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    for use in (lambda: train(data, tmp_path, TINY, PACE, RESUME), lambda: load(tmp_path)):
        with pytest.raises(DataError, match="not a readable checkpoint"):
            use()


def test_a_diverging_run_is_stopped_and_its_checkpoint_is_finite(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = Trainer._step, 0

    def poisoned(self: Trainer, batch: SessionBatch) -> None:
        nonlocal calls
        calls += 1
        if calls == 8:
            with torch.no_grad():
                next(self.model.parameters()).view(-1)[0] = torch.nan
        step(self, batch)

    monkeypatch.setattr(Trainer, "_step", poisoned)
    with pytest.raises(FloatingPointError, match="no longer finite in epoch 2"):
        train(data, tmp_path, TINY, PACE)
    assert all(value.isfinite().all() for value in checkpoint(tmp_path)["model"].values())


def test_the_rate_falls_on_a_plateau_and_patience_ends_it(data: Path, tmp_path: Path) -> None:
    # A rate this small changes nothing that validation could see.
    pace = Pace(epochs=9, learning_rate=1e-9, least_rate=2e-10, plateau=0, patience=4)
    _, run = train(data, tmp_path, TINY, pace)
    rates = [record["learning_rate"] for record in run.history]
    assert rates == pytest.approx([1e-9, 1e-9, 3e-10, 2e-10, 2e-10])
    assert run.best_epoch == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["history"] == run.history
    assert report["settings"]["model"] == TINY.model


@pytest.mark.slow
def test_two_processes_train_as_one(data: Path, tmp_path: Path) -> None:
    words = ["skip", "train", "--data", str(data), "--batch", "49", "--width", "3", "--layers"]
    words += ["1", "--epochs", "1", "--lr", "1e-3", "--threads", "1", "--save-every", "2", "--out"]
    assert command([*words, str(tmp_path / "two")], processes=2) == 0
    settings = replace(TINY, batch_size=49)
    train(data, tmp_path / "one", settings, replace(PACE, epochs=1))
    one, two = (checkpoint(tmp_path / name) for name in ("one", "two"))
    start = build(settings).state_dict()
    for name, expected in one["model"].items():
        moved = (expected - start[name]).abs().max()
        assert (two["model"][name] - expected).abs().max() <= 0.02 * moved + 1e-7
    for name in ("train_loss", "Acc", "Acc@1", "MAA"):
        assert two["history"][0][name] == pytest.approx(one["history"][0][name], rel=1e-4)
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report["means"]["processes"] == 2
