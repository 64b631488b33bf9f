"""Training on a stream of sessions: data-parallel, and resumable after any step, bit for bit."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.checkpoint import (
    CHECKPOINT_FORMAT,
    PLAIN,
    check_progress,
    failing,
    load_checkpoint,
    restore_model,
    restore_optimizer,
    restoring,
    save_checkpoint,
)
from maskmoe_kernels.experiments.shared.ranks import Ranks
from maskmoe_kernels.experiments.shared.structure import Spec, check
from maskmoe_kernels.experiments.shared.train import Metrics, Run, duration, progress_bar
from maskmoe_kernels.experiments.skip.data.features import SessionBatch
from maskmoe_kernels.experiments.skip.data.sessions import SessionLoader

MONITOR = "Acc"
# What moves in the state of a scheduler.
_MOVING = {"best", "num_bad_epochs", "cooldown_counter", "last_epoch", "_last_lr"}
# What a checkpoint holds besides weights, optimizer and history.
_STATE: Spec = {
    "scheduler": {str: object},
    "cursor": {str: PLAIN},
    "random": {"torch": Tensor, "cuda": [Tensor], "python": list},
    "running": {"sums": Tensor, "done": int, "seconds": float},
}


@dataclass(frozen=True)
class Pace:
    """How a stream is trained on.

    Attributes:
        epochs: Most epochs to train.
        steps: Steps of an epoch, after which the model is validated; the pass over the data goes
            on where it stood. ``None``: an epoch is a pass.
        patience: Epochs without a better validation Acc before training stops.
        learning_rate: Adam's, at first.
        least_rate: What it is reduced to at the least.
        reduce: What it is multiplied by on a plateau.
        plateau: Epochs without a better validation Acc before it is reduced.
        clip: Largest norm of all gradients together; larger ones are scaled down to it.
        save_every: Steps between checkpoints; there is one after every epoch, too.
    """

    epochs: int = 20
    steps: int | None = None
    patience: int = 4
    learning_rate: float = 1e-4
    least_rate: float = 1e-6
    reduce: float = 0.3
    plateau: int = 1
    clip: float = 1.0
    save_every: int = 500


class Trainer:
    """A model in training on the sessions of a loader.

    The state is a function of the settings and the number of steps alone: what a checkpoint
    holds, and nothing else, decides how training goes on.

    Args:
        model: Trained in place.
        loss_of: Batch to this process's part of the loss, scaled such that the mean over the
            processes is the loss of the whole batch.
        validate: Metrics of the model as it is, the same in every process.
        loader: Of training batches.
        pace: See :class:`Pace`.
        identity: What a checkpoint must agree with to be gone on from; plain values.
        checkpoint: Where the first process writes.
        ranks: The processes.
        console: For progress and a line an epoch; ``None`` is quiet.
        report: Called after every epoch, by the first process, with the history.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_of: Callable[[SessionBatch], Tensor],
        validate: Callable[[], Metrics],
        loader: SessionLoader,
        pace: Pace,
        identity: dict[str, Any],
        checkpoint: Path,
        ranks: Ranks,
        console: Console | None = None,
        report: Callable[[list[dict[str, float]]], None] | None = None,
    ) -> None:
        self.model, self.loss_of, self.validate, self.loader = model, loss_of, validate, loader
        self.pace, self.identity, self.checkpoint, self.ranks = pace, identity, checkpoint, ranks
        self.console = console if ranks.first else None
        self.report = report if ranks.first else None
        self.optimizer = torch.optim.Adam(model.parameters(), lr=pace.learning_rate, fused=True)
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer,
            mode="max",
            factor=pace.reduce,
            patience=pace.plateau,
            threshold=0.0,
            min_lr=pace.least_rate,
            eps=0.0,
        )
        # Of the epoch under way: loss, sessions and norms of gradients; steps; seconds.
        self.sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)
        self.done, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] | None = None

    def run(self) -> Run:
        """Train to the end; the model then holds the best epoch's weights.

        Raises:
            FloatingPointError: The loss or a metric is not finite; the checkpoint is of before.
        """
        while not self._finished():
            self._train_epoch()
            self._close_epoch()
        if self.best is None:
            raise ValueError("no epoch was trained")
        if self.report is not None:  # also where a killed run had no more to train
            self.report(self.history)
        self.model.load_state_dict(self.best["model"])
        self.model.eval()
        return Run(self.history, self.best["epoch"], self.best["metrics"], self.best["model"])

    def _finished(self) -> bool:
        done = len(self.history)
        waited = 0 if self.best is None else done - self.best["epoch"]
        return done >= self.pace.epochs or waited >= self.pace.patience

    # --- One epoch -------------------------------------------------------------------------

    def _train_epoch(self) -> None:
        self.model.train()
        started = time.perf_counter() - self.seconds
        total = self.pace.steps or len(self.loader)
        with progress_bar(self.console) as bar:
            name = f"{self.identity['model']} {len(self.history) + 1}/{self.pace.epochs}"
            task = bar.add_task(name, total=total, completed=self.done, speed="")
            for batch in self._batches():
                self._step(batch)
                self.seconds = time.perf_counter() - started
                if self.done % 20 == 0 and not bar.disable:
                    loss, sessions, _ = self.sums.tolist()
                    speed = sessions * self.ranks.world / self.seconds
                    text = f"loss {loss / self.done:.4f}  {speed:,.0f} sessions/s"
                    bar.update(task, completed=self.done, speed=text)
                if self.done % self.pace.save_every == 0 and self.done < total:
                    self.save()

    def _batches(self) -> Iterator[SessionBatch]:
        """The batches of the rest of the epoch."""
        steps = self.pace.steps
        while steps is None or self.done < steps:
            for batch in self.loader:
                self.done += 1
                yield batch
                if self.done == steps:
                    return
            if steps is None:
                return

    def _step(self, batch: SessionBatch) -> None:
        batch = batch.to(self.ranks.device, non_blocking=True)
        self.optimizer.zero_grad()
        loss = self.loss_of(batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.pace.clip)
        self.optimizer.step()
        part = loss.detach().double()
        self.sums += torch.stack([part, part.new_tensor(len(batch)), norm.double()])

    def _close_epoch(self) -> None:
        """Validate, note the epoch, reduce the rate, keep the best weights, save."""
        loss, sessions, _ = self._checked_sums().tolist()
        self.model.eval()
        metrics = self.validate()
        for name, value in metrics.items():
            self._check_finite(name, value)
        epoch = len(self.history) + 1
        record = {
            "epoch": epoch,
            # The mean over processes of their parts is the loss of the whole batch.
            "train_loss": loss / (self.ranks.world * max(self.done, 1)),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "sessions_per_s": sessions / max(self.seconds, 1e-9),
            **metrics,
        }
        self.history.append(record)
        if self.best is None or metrics[MONITOR] > self.best["metrics"][MONITOR]:
            weights = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
            self.best = {"epoch": epoch, "metrics": metrics, "model": weights}
        self.scheduler.step(metrics[MONITOR])
        seconds = self.seconds
        self.sums.zero_()
        self.done, self.seconds = 0, 0.0
        self.save()
        if self.report is not None:
            self.report(self.history)
        if self.console is not None:
            self.console.print(self._line(record, seconds), highlight=False)

    def _checked_sums(self) -> Tensor:
        """The sums over all processes, which are finite as long as all weights are."""
        sums = self.ranks.sum(self.sums)
        for what, value in zip(("loss", "sessions", "gradient"), sums.tolist(), strict=True):
            self._check_finite(what, value)
        return sums

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{self.identity['model']}: the {what} is no longer finite in epoch "
                f"{len(self.history) + 1}; lower the learning rate "
                f"({self.pace.learning_rate:g}) and check the data. The checkpoint is of before"
            )

    def _line(self, record: dict[str, float], seconds: float) -> str:
        best = 0 if self.best is None else self.best["epoch"]
        metrics = "  ".join(f"{k} {record[k]:.4f}" for k in ("train_loss", "Acc", "Acc@1", "MAA"))
        kept = "kept" if best == record["epoch"] else f"best is epoch {best}"
        return (
            f"{self.identity['model']}: epoch {record['epoch']}/{self.pace.epochs}  {metrics}  "
            f"rate {record['learning_rate']:.1e}  {record['sessions_per_s']:,.0f} sessions/s  "
            f"{duration(seconds)}  ({kept})"
        )

    # --- Checkpoints -----------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint: the old one or the whole new one is there at any moment."""
        sums = self._checked_sums()
        if not self.ranks.first:
            return
        states = [torch.cuda.get_rng_state()] if self.ranks.device.type == "cuda" else []
        state = {
            "format": CHECKPOINT_FORMAT,
            "config": self.identity,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "cursor": self.loader.state_dict(),
            "random": {"torch": torch.get_rng_state(), "cuda": states, "python": _random_state()},
            "running": {"sums": sums.cpu(), "done": self.done, "seconds": self.seconds},
            "history": self.history,
            "best": self.best,
        }
        save_checkpoint(state, self.checkpoint)

    def resume(self) -> bool:
        """Go on from the checkpoint, if there is one.

        Raises:
            DataError: It is damaged, or of other settings, data or another version.
        """
        if not self.checkpoint.exists():
            return False
        saved = load_checkpoint(self.checkpoint)
        self._check_identity(saved["config"])
        check(saved, _STATE, failing(self.checkpoint))
        check_progress(self.checkpoint, saved, MONITOR)
        if saved["best"] is not None:
            restore_model(self.checkpoint, self.model, saved["best"]["model"])
        restore_model(self.checkpoint, self.model, saved["model"])
        restore_optimizer(self.checkpoint, self.optimizer, saved.get("optimizer"))
        self._restore_scheduler(saved["scheduler"])
        with restoring(self.checkpoint, "random states and sums"):
            torch.set_rng_state(saved["random"]["torch"])
            for state in saved["random"]["cuda"]:
                torch.cuda.set_rng_state(state, self.ranks.device)
            random.setstate(_as_tuples(saved["random"]["python"]))
            sums = saved["running"]["sums"].view_as(self.sums)
        if self.ranks.first:
            self.sums.copy_(sums)
        try:
            self.loader.load_state_dict(saved["cursor"])
        except DataError as error:
            raise DataError(f"{self.checkpoint}: {error}") from error
        self.history, self.best = saved["history"], saved["best"]
        self.done, self.seconds = saved["running"]["done"], saved["running"]["seconds"]
        return True

    def _restore_scheduler(self, saved: dict[str, Any]) -> None:
        own, fail = self.scheduler.state_dict(), failing(self.checkpoint)
        check(saved, {key: type(own[key]) for key in _MOVING - {"best"}}, fail, "scheduler")
        best = saved.get("best")  # infinite until the first validation
        if not isinstance(best, float) or math.isnan(best):
            raise fail(f"expected scheduler.best to be a number, got {best!r}")
        known = {key: saved[key] for key in own if key in saved}
        with restoring(self.checkpoint, "learning rate's schedule"):
            for key in known.keys() - _MOVING:
                if known[key] != own[key]:
                    got = f"{own[key]!r}, got {known[key]!r}"
                    raise fail(f"expected scheduler.{key} to be {got}")
            self.scheduler.load_state_dict(known)

    def _check_identity(self, saved: dict[str, Any]) -> None:
        for name, value in self.identity.items():
            if saved.get(name) != value:
                raise DataError(
                    f"{self.checkpoint}: was trained with {name}={saved.get(name)!r}, this run has "
                    f"{value!r}; use the same, another --out folder, or --no-resume to start over"
                )


def _random_state() -> list[Any]:
    version, words, gauss = random.getstate()
    return [version, list(words), gauss]


def _as_tuples(state: list[Any]) -> tuple[Any, ...]:
    version, words, gauss = state
    return version, tuple(words), gauss
