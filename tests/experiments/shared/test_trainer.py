"""The training loop: resuming, checkpoints, the best epoch, and numbers that are not finite."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from maskmoe_kernels.cli import main
from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.checkpoint import load_checkpoint
from maskmoe_kernels.experiments.shared.source import TensorSource
from maskmoe_kernels.experiments.shared.trainer import Pace, Run, Trainer
from tests.experiments.movielens.tiny import write_movielens


@dataclass(frozen=True)
class Config:
    """What a checkpoint of these tests names."""

    model: str = "tiny"
    epochs: int = 5
    patience: int = 9
    batch_size: int = 7
    learning_rate: float = 1e-3
    seed: int = 3
    monitor: str = "NDCG@10"
    options: str = ""


CONFIG = Config()


class Problem:
    """A little regression; the metric is scripted where ``script`` holds an entry."""

    def __init__(self, seed: int = 0, script: tuple[float, ...] = (), stop_in: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
        self.script: Iterator[float] = iter(script)
        self.stop_in = stop_in
        self.epoch = 0
        self.weights: dict[int, dict[str, Tensor]] = {}

    def epoch_of(self, number: int) -> tuple[Tensor, ...]:
        self.epoch = number
        x = torch.randn(40, 4, generator=torch.Generator().manual_seed(100 + number))
        return x, x.sin().sum(1, keepdim=True)

    def loss_of(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.model(x), y)

    def validate(self) -> dict[str, float]:
        if self.epoch == self.stop_in:
            raise KeyboardInterrupt
        assert not self.model.training
        self.weights[self.epoch] = {k: v.clone() for k, v in self.model.state_dict().items()}
        metric = next(self.script, None)
        if metric is None:
            metric = -float(self.loss_of(*self.epoch_of(0)).detach())
            self.epoch = max(self.weights)
        return {"NDCG@10": metric}

    def fit(
        self,
        path: Path,
        config: Config = CONFIG,
        resume: bool = False,
        console: Console | None = None,
        save_every: int | None = None,
    ) -> Run:
        trainer = Trainer(
            self.model,
            TensorSource(self.epoch_of, config.batch_size),
            lambda batch: self.loss_of(*batch),
            self.validate,
            Pace(
                epochs=config.epochs,
                patience=config.patience,
                learning_rate=config.learning_rate,
                save_every=save_every,
            ),
            asdict(config),
            path,
            monitor=config.monitor,
            console=console,
        )
        trainer.begin(resume)
        return trainer.run()


def without_speed(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in entry.items() if k != "samples_per_s"} for entry in history]


def assert_same_bits(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            if key != "samples_per_s":
                assert_same_bits(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_bits(x, y)
    else:
        assert a == b


# --- Resuming ----------------------------------------------------------------------------


@pytest.mark.parametrize("stop_in", [1, 2, 3, 4, 5])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, stop_in: int) -> None:
    undisturbed = Problem(seed=1).fit(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        Problem(seed=1, stop_in=stop_in).fit(tmp_path / "cut.pt")
    # Other initial weights where the checkpoint has to supply them.
    again = Problem(seed=1 if stop_in == 1 else 99)
    resumed = again.fit(tmp_path / "cut.pt", resume=True)
    assert_same_bits(load_checkpoint(tmp_path / "whole.pt"), load_checkpoint(tmp_path / "cut.pt"))
    assert_same_bits(undisturbed.state, resumed.state)
    assert_same_bits(undisturbed.state, dict(again.model.state_dict()))
    assert (undisturbed.best_epoch, undisturbed.best) == (resumed.best_epoch, resumed.best)
    assert without_speed(undisturbed.history) == without_speed(resumed.history)


def test_an_epoch_that_was_cut_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Problem(stop_in=3).fit(tmp_path / "x.pt")
    saved = load_checkpoint(tmp_path / "x.pt")
    assert saved["epoch"] == len(saved["history"]) == 2


@pytest.mark.parametrize("stops", [(1,), (4, 4), (8, 3, 3), (11, 9)], ids=str)
def test_a_run_is_resumed_after_any_step(
    tmp_path: Path, stops: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = Problem(seed=1).fit(tmp_path / "whole.pt", save_every=2)
    step, left = Trainer._step, 0

    def stopping(self: Trainer[Any], batch: tuple[Tensor, ...]) -> None:
        nonlocal left
        step(self, batch)
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_step", stopping)
    for stop in stops:
        left = stop
        with pytest.raises(KeyboardInterrupt):
            Problem(seed=1).fit(tmp_path / "cut.pt", resume=True, save_every=2)
    resumed = Problem(seed=1).fit(tmp_path / "cut.pt", resume=True, save_every=2)
    assert_same_bits(undisturbed.state, resumed.state)
    assert without_speed(undisturbed.history) == without_speed(resumed.history)
    whole, cut = (load_checkpoint(tmp_path / name) for name in ("whole.pt", "cut.pt"))
    for key in ("model", "optimizer", "best"):
        assert_same_bits(whole[key], cut[key])


def test_a_finished_run_is_only_loaded(tmp_path: Path) -> None:
    run = Problem().fit(tmp_path / "x.pt")
    before = (tmp_path / "x.pt").read_bytes()
    problem = Problem(seed=9)
    for epochs in (5, 2):
        again = problem.fit(tmp_path / "x.pt", replace(CONFIG, epochs=epochs), resume=True)
        assert_same_bits(again.state, run.state)
    assert problem.weights == {}
    assert (tmp_path / "x.pt").read_bytes() == before


def test_more_epochs_go_on(tmp_path: Path) -> None:
    Problem().fit(tmp_path / "x.pt", replace(CONFIG, epochs=2, patience=1))
    longer = Problem(seed=9).fit(tmp_path / "x.pt", resume=True)
    assert_same_bits(longer.state, Problem().fit(tmp_path / "whole.pt").state)


def test_without_resume_it_starts_afresh(tmp_path: Path) -> None:
    first = Problem().fit(tmp_path / "x.pt")
    screen = io.StringIO()
    second = Problem().fit(tmp_path / "x.pt", console=Console(file=screen, width=200))
    assert_same_bits(first.state, second.state)
    assert "starting afresh" in screen.getvalue()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "other"),
        ("batch_size", 8),
        ("learning_rate", 0.5),
        ("seed", 4),
        ("monitor", "HR@10"),
        ("options", "embeddings=strict"),
    ],
)
def test_another_configuration_is_refused_by_name(tmp_path: Path, name: str, value: Any) -> None:
    Problem().fit(tmp_path / "x.pt", replace(CONFIG, epochs=1))
    before = (tmp_path / "x.pt").read_bytes()
    with pytest.raises(DataError, match=f"was trained with {name}=.*{value!r}"):
        Problem().fit(tmp_path / "x.pt", replace(CONFIG, **{name: value}), resume=True)
    assert (tmp_path / "x.pt").read_bytes() == before


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    Problem().fit(tmp_path / "x.pt", replace(CONFIG, epochs=1))
    problem = Problem()
    problem.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    with pytest.raises(DataError, match=r"do not fit this model.*size mismatch"):
        problem.fit(tmp_path / "x.pt", resume=True)


def test_an_optimizer_state_of_swapped_layers_names_parameter_and_shapes(tmp_path: Path) -> None:
    Problem().fit(tmp_path / "x.pt", replace(CONFIG, epochs=1))
    saved = load_checkpoint(tmp_path / "x.pt")
    state = saved["optimizer"]["state"]
    state[0], state[2] = state[2], state[0]
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(
        DataError,
        match=r"state\.0\.exp_avg .*the parameter 0\.weight \(6, 4\), got torch.float32 \(1, 6\): "
        r".*a layer was swapped.*--overwrite",
    ):
        Problem().fit(tmp_path / "x.pt", resume=True)


# --- The checkpoint ----------------------------------------------------------------------


def test_a_crash_while_saving_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.pt"
    Problem().fit(path, replace(CONFIG, epochs=1))
    before = path.read_bytes()

    def full(obj: Any, target: IO[bytes]) -> None:
        target.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        Problem().fit(path, resume=True)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_the_format_that_earlier_runs_wrote(tmp_path: Path) -> None:
    Problem().fit(tmp_path / "x.pt", replace(CONFIG, epochs=1))
    saved = load_checkpoint(tmp_path / "x.pt")
    assert saved["format"] == 1
    assert set(saved) == {
        "format", "config", "model", "optimizer", "epoch", "history", "best"
    }  # fmt: skip
    assert set(saved["best"]) == {"epoch", "metrics", "model"}
    assert set(saved["config"]) == {
        "model", "epochs", "patience", "batch_size", "learning_rate", "seed", "monitor", "options"
    }  # fmt: skip


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with pytest.raises(DataError, match="no such checkpoint"):
        load_checkpoint(path)
    path.write_bytes(b"not a zip at all")
    with pytest.raises(DataError, match="not a readable checkpoint"):
        load_checkpoint(path)
    Problem().fit(path, replace(CONFIG, epochs=1))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match="not a readable checkpoint"):
        Problem().fit(path, resume=True)
    torch.save({"format": 99}, path)
    with pytest.raises(DataError, match="expected a checkpoint of format 1"):
        load_checkpoint(path)


# --- Numbers that are none ---------------------------------------------------------------


class Failing(Problem):
    """From epoch 3 on, something is not finite in the last of its six steps."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def loss_of(self, x: Tensor, y: Tensor) -> Tensor:
        loss = super().loss_of(x, y)
        if self.epoch < 3 or len(x) == CONFIG.batch_size:
            return loss
        if self.what == "loss":
            return loss * torch.nan
        if self.what == "weight":  # sqrt has no derivative at 0, the loss stays finite
            return loss + (next(self.model.parameters()) * 0).sqrt().sum()
        return loss

    def validate(self) -> dict[str, float]:
        if self.epoch >= 3 and self.what == "NDCG@10":
            return {"NDCG@10": float("nan")}
        return super().validate()


@pytest.mark.parametrize("what", ["loss", "weight", "NDCG@10"])
def test_an_epoch_that_is_not_finite_is_never_kept(tmp_path: Path, what: str) -> None:
    problem = Failing(what)
    with pytest.raises(
        FloatingPointError, match=rf"tiny: the {what}.* no longer finite in epoch 3"
    ):
        problem.fit(tmp_path / "x.pt")
    saved = load_checkpoint(tmp_path / "x.pt")
    assert saved["epoch"] == len(saved["history"]) == 2
    for weights in (saved["model"], saved["best"]["model"]):
        assert all(bool(value.isfinite().all()) for value in weights.values())


# --- Which epoch, and when to stop -------------------------------------------------------


def test_the_best_epoch_is_kept(tmp_path: Path) -> None:
    problem = Problem(script=(0.1, 0.5, 0.3, 0.5, 0.4))
    run = problem.fit(tmp_path / "x.pt")
    assert (run.best_epoch, run.best) == (2, {"NDCG@10": 0.5})  # the first of equals
    assert_same_bits(run.state, problem.weights[2])
    assert_same_bits(dict(problem.model.state_dict()), problem.weights[2])
    assert not problem.model.training
    assert [entry["NDCG@10"] for entry in run.history] == [0.1, 0.5, 0.3, 0.5, 0.4]
    saved = load_checkpoint(tmp_path / "x.pt")
    assert_same_bits(saved["model"], problem.weights[5])
    assert_same_bits(saved["best"]["model"], problem.weights[2])


@pytest.mark.parametrize(("patience", "epochs"), [(1, 3), (2, 4), (3, 5)])
def test_patience(tmp_path: Path, patience: int, epochs: int) -> None:
    problem = Problem(script=(0.1, 0.5, 0.3, 0.5, 0.4))
    run = problem.fit(tmp_path / "x.pt", replace(CONFIG, patience=patience))
    assert len(run.history) == epochs
    assert run.best_epoch == 2


@pytest.mark.parametrize("name", ["epochs", "patience", "batch_size"])
def test_counts_start_at_one(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Problem().fit(tmp_path / "x.pt", replace(CONFIG, **{name: 0}))


def test_the_mean_loss_counts_every_sample_once(tmp_path: Path) -> None:
    problem = Problem()
    frozen = replace(CONFIG, epochs=1, learning_rate=1e-30)
    run = problem.fit(tmp_path / "x.pt", frozen)
    whole = float(problem.loss_of(*problem.epoch_of(1)).detach())
    assert run.history[0]["train_loss"] == pytest.approx(whole, rel=1e-6)


def test_progress_is_readable(tmp_path: Path) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, width=160, force_terminal=True, color_system=None)
    Problem(script=(0.1, 0.5, 0.3)).fit(
        tmp_path / "x.pt", replace(CONFIG, epochs=3, batch_size=1), console=terminal
    )
    text = screen.getvalue()
    assert "epoch 2/3" in text
    assert "NDCG@10 0.5000" in text
    assert "(best is epoch 2)" in text


# --- Killed ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this platform")
def test_killed_in_mid_training_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow", reason="reads MovieLens")
    monkeypatch.setattr(
        "maskmoe_kernels.experiments.shared.plot_style.unsupported_reason", lambda: "not now"
    )
    data = write_movielens(tmp_path / "ml-1m")
    out, checkpoint = tmp_path / "cut", tmp_path / "cut" / "content.pt"

    def words(folder: Path, epochs: int) -> list[str]:
        return ["movielens", "--data", str(data), "--models", "content", "--batch-size", "512",
                "--patience", "1000", "--epochs", str(epochs), "--out", str(folder)]  # fmt: skip

    # Other sums than with as many threads.
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "maskmoe_kernels", *words(out, 1000)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not checkpoint.exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    done = load_checkpoint(checkpoint)["epoch"]
    assert main([*words(out, done + 2), "--resume"]) == 0
    assert main(words(tmp_path / "whole", done + 2)) == 0
    cut, whole = load_checkpoint(checkpoint), load_checkpoint(tmp_path / "whole" / "content.pt")
    assert cut["epoch"] == done + 2
    assert_same_bits(whole, cut)
