"""The training loop: data-parallel, keeps the best epoch, and is resumed with the same bits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.checkpoint import (
    CHECKPOINT_FORMAT,
    PLAIN,
    check_progress,
    failing,
    load_checkpoint,
    random_state,
    restore_model,
    restore_optimizer,
    restore_random_state,
    restore_scheduler,
    restoring,
    save_checkpoint,
)
from maskmoe_kernels.experiments.shared.output import print_line, print_record
from maskmoe_kernels.experiments.shared.progress import duration, shown_progress
from maskmoe_kernels.experiments.shared.ranks import Ranks
from maskmoe_kernels.experiments.shared.source import Batch, Source
from maskmoe_kernels.experiments.shared.structure import Spec, check
from maskmoe_kernels.nn import RowAdam

Metrics = dict[str, float]

# What a checkpoint holds in addition if it may be written within an epoch.
_WITHIN_EPOCH: Spec = {
    "cursor": {str: PLAIN},
    "random": {"torch": Tensor, "cuda": [Tensor], "python": list},
    "running": {"sums": Tensor, "done": int, "seconds": float},
}
# These may differ in a resumed run: they say when training ends, and change no step.
_MAY_CHANGE = ("epochs", "patience")
# Steps between two checks that the sums are finite, and between two updates of the progress bar.
# Both wait for the device.
_CHECK_EVERY, _SHOW_EVERY = 200, 20


@dataclass(frozen=True)
class Pace:
    """How long to train, at which learning rate, and how often to save.

    Attributes:
        epochs: Most epochs to train.
        steps: Steps of an epoch, for a source that takes such a number; ``None``: an epoch is a
            pass over the data.
        patience: Epochs without a better validation metric before training stops.
        learning_rate: Adam's, at first.
        least_rate: What it is reduced to at the least.
        reduce: What it is multiplied by on a plateau.
        plateau: Epochs without a better validation metric before it is reduced; ``None``: it
            stays.
        clip: Largest norm of all gradients together; larger ones are scaled down to it.
            ``None``: they stay.
        save_every: Steps between checkpoints within an epoch; ``None``: there is one after every
            epoch only.
    """

    epochs: int = 20
    steps: int | None = None
    patience: int = 5
    learning_rate: float = 1e-3
    least_rate: float = 1e-6
    reduce: float = 0.3
    plateau: int | None = None
    clip: float | None = None
    save_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class Run:
    """What training leaves.

    Attributes:
        history: One record an epoch: its number, mean training loss, speed and metrics.
        best_epoch: Epoch whose weights are kept, from 1.
        best: Its validation metrics.
        state: Its weights, a ``state_dict``.
    """

    history: list[dict[str, float]]
    best_epoch: int
    best: Metrics
    state: dict[str, Tensor]


def take_step(
    optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor], clip: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """One step down the gradient of a loss.

    Args:
        optimizer: Of the parameters.
        loss_of: Computes the loss, a scalar.
        clip: Largest norm of all gradients together; ``None``: any.

    Returns:
        The loss, detached, and the norm of all gradients before clipping (``None`` without).
    """
    optimizer.zero_grad()  # first, so that new gradients lie where the old ones were
    loss = loss_of()
    loss.backward()
    norm = None
    if clip is not None:
        norm = _clip([p for group in optimizer.param_groups for p in group["params"]], clip)
    optimizer.step()
    return loss.detach(), norm


def _clip(parameters: list[Tensor], most: float) -> Tensor:
    """``nn.utils.clip_grad_norm_``, of sparse gradients, too."""
    gradients = []
    for parameter in parameters:
        if (gradient := parameter.grad) is not None:
            if gradient.is_sparse:  # a row may be there twice
                parameter.grad = gradient.coalesce()
                gradient = parameter.grad.values()
            gradients.append(gradient)
    norm = nn.utils.get_total_norm(gradients)
    nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm


class Trainer(Generic[Batch]):
    """Trains a model with :class:`RowAdam`, validates it after each epoch, and keeps the best one.

    A checkpoint holds all of the state: a resumed run ends with the same bits as one that was
    never stopped. With ``pace.save_every`` it can be resumed within an epoch, otherwise after
    every epoch.

    Args:
        model: Trained in place.
        source: Of training batches.
        loss_of: Batch to this process's part of the loss, scaled such that the mean over the
            processes is the loss of the whole batch.
        validate: Metrics of the model as it is, larger is better; the same in every process.
        pace: See :class:`Pace`.
        identity: What a checkpoint must agree with to be resumed from; plain values, with the
            model's name as ``"model"``. ``"epochs"`` and ``"patience"`` may differ.
        checkpoint: Where the first process writes, atomically.
        monitor: Validation metric whose best epoch is kept.
        ranks: The processes; by default this one alone, on the CPU.
        console: For progress and a line an epoch; ``None`` is quiet.
        report: Called after every epoch, by the first process, with the history.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Source[Batch],
        loss_of: Callable[[Batch], Tensor],
        validate: Callable[[], Metrics],
        pace: Pace,
        identity: dict[str, Any],
        checkpoint: Path,
        *,
        monitor: str,
        ranks: Ranks | None = None,
        console: Console | None = None,
        report: Callable[[list[dict[str, float]]], None] | None = None,
    ) -> None:
        self.model, self.source, self.loss_of, self.validate = model, source, loss_of, validate
        self.pace, self.identity, self.checkpoint = pace, identity, checkpoint
        self.monitor, self.name = monitor, identity["model"]
        self.ranks = ranks or Ranks(torch.device("cpu"))
        self.console = console if self.ranks.first else None
        self.report = report if self.ranks.first else None
        self.optimizer = RowAdam(model, lr=pace.learning_rate)
        self.scheduler = _scheduler(self.optimizer, pace)
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] | None = None
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        # Of the current epoch, in this process: losses and norms of gradients, summed over the
        # steps; the numbers of steps, samples and seconds.
        self.loss_sum, self.norm_sum = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        self.done, self.samples, self.seconds = 0, 0, 0.0

    def begin(self, resume: bool) -> None:
        """Resume from the checkpoint where that is asked for and there is one; the console says so.

        Raises:
            DataError: The checkpoint is damaged, or of other settings, data or another version.
        """
        replaced = self.checkpoint.exists()
        if resume and self.resume():
            text = f"going on after epoch {len(self.history)}"
            text += f" and {self.done} steps" if self.done else ""
            text += f" of {self.checkpoint}"
        elif replaced:
            text = f"starting afresh, {self.checkpoint} will be replaced"
        else:
            text = f"starting, into {self.checkpoint.parent}"
        if self.console is not None:
            print_line(self.console, f"{self.name}: {text}")

    def run(self) -> Run:
        """Train to the end; the model then holds the best epoch's weights.

        A run that has as many epochs as ``pace`` asks for, or more, is used as it stands.

        Raises:
            FloatingPointError: The loss, a weight or a metric is not finite. The checkpoint is of
                before that.
        """
        while not self._finished():
            self._train_epoch()
            self._close_epoch()
        if self.best is None:
            raise ValueError("no epoch was trained")
        if self.report is not None:  # the run may have been killed just before its last report
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
        epoch, save_every = len(self.history) + 1, self.pace.save_every
        total, batches = self.source.epoch(epoch, self.done)
        name = f"{self.name} {epoch}/{self.pace.epochs}"
        with shown_progress(self.console, name, total, self.done) as advance:
            for batch in batches:
                self._step(batch)
                self.seconds = time.perf_counter() - started
                if self.done % _CHECK_EVERY == 0:
                    self._checked_sums()
                if self.done % _SHOW_EVERY == 0:
                    advance(self.done, self._speed)
                if save_every is not None and self.done % save_every == 0 and self.done < total:
                    self.save()
        self._checked_sums()  # waits for the device
        self.seconds = time.perf_counter() - started

    def _step(self, batch: Batch) -> None:
        loss, norm = take_step(self.optimizer, lambda: self.loss_of(batch), self.pace.clip)
        count = self.source.samples(batch)
        self.loss_sum.add_(loss, alpha=count if self.source.by_sample else 1)
        if norm is not None:
            self.norm_sum += norm
        self.done += 1
        self.samples += count

    def _close_epoch(self) -> None:
        """Validate, note the epoch, reduce the rate, keep the best weights, save."""
        loss, samples, _ = self._checked_sums().tolist()
        self.optimizer.settle()
        metrics = self._checked_metrics()
        epoch, seconds = len(self.history) + 1, self.seconds
        # The mean over processes of their parts is the loss of the whole batch.
        count = samples if self.source.by_sample else self.ranks.world * self.done
        record = {"epoch": epoch, "train_loss": loss / max(count, 1)}
        if self.scheduler is not None:
            record["learning_rate"] = self.optimizer.param_groups[0]["lr"]
            self.scheduler.step(metrics[self.monitor])
        record |= {f"{self.source.unit}_per_s": samples / max(seconds, 1e-9), **metrics}
        self.history.append(record)
        if self.best is None or metrics[self.monitor] > self.best["metrics"][self.monitor]:
            weights = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
            self.best = {"epoch": epoch, "metrics": metrics, "model": weights}
        self._begin_epoch()
        self.save()
        if self.report is not None:
            self.report(self.history)
        if self.console is not None:
            self._print_epoch(self.console, record, seconds)

    def _checked_metrics(self) -> Metrics:
        """Metrics after an epoch; weights and metrics are finite."""
        # A finite loss may have a gradient that is not finite.
        for name, value in self.model.named_parameters():
            if not bool(value.isfinite().all()):
                self._check_finite(f"weight {name}", math.nan)
        self.model.eval()
        metrics = self.validate()
        for name, number in metrics.items():
            self._check_finite(name, number)
        return metrics

    def _checked_sums(self) -> Tensor:
        """Loss, samples and norms summed over all processes; finite as long as all weights are."""
        samples = self.loss_sum.new_tensor(self.samples)
        sums = self.ranks.sum(torch.stack([self.loss_sum, samples, self.norm_sum])).cpu()
        for what, value in zip(("loss", "samples", "gradient"), sums.tolist(), strict=True):
            self._check_finite(what, value)
        return sums

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{self.name}: the {what} is no longer finite in epoch {len(self.history) + 1}; "
                f"lower the learning rate ({self.pace.learning_rate:g}) and check the data. The "
                "last checkpoint is of before that"
            )

    # --- What the console shows ------------------------------------------------------------

    def _speed(self) -> str:
        count = self.samples if self.source.by_sample else self.done
        speed = self.samples * self.ranks.world / self.seconds
        loss = f"training loss {float(self.loss_sum) / count:.4f}"
        return f"{loss}, {speed:,.0f} {self.source.unit}/s"

    def _print_epoch(self, console: Console, record: dict[str, float], seconds: float) -> None:
        epoch, best = len(self.history), 0 if self.best is None else self.best["epoch"]
        speed = f"{self.source.unit}_per_s"
        own = ("epoch", "train_loss", "learning_rate", speed)
        fields = {"training loss": f"{record['train_loss']:.4f}"}
        fields |= {f"validation {k}": f"{v:.4f}" for k, v in record.items() if k not in own}
        if "learning_rate" in record:
            fields["learning rate"] = f"{record['learning_rate']:.1e}"
        fields["speed"] = f"{record[speed]:,.0f} {self.source.unit}/s"
        fields["time"] = duration(seconds)
        kept = "kept" if best == epoch else f"best is epoch {best}"
        # Training may end earlier, when patience does.
        most = min(self.pace.epochs, best + self.pace.patience) - epoch
        left = "" if most < 1 else f", {duration(most * seconds)} left if none is better"
        fields[f"({kept}{left})"] = ""
        print_record(console, f"{self.name}: epoch {epoch}/{self.pace.epochs}", fields)

    # --- Checkpoints -----------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint: the old one or the whole new one is there at any moment."""
        sums = self._checked_sums()
        if not self.ranks.first:
            return
        state = {
            "format": CHECKPOINT_FORMAT,
            "config": self.identity,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": len(self.history),
            "history": self.history,
            "best": self.best,
        }
        if self.scheduler is not None:
            state["scheduler"] = self.scheduler.state_dict()
        if self.pace.save_every is not None:
            state["cursor"] = self.source.state_dict()
            state["random"] = random_state(self.ranks.device)
            state["running"] = {"sums": sums, "done": self.done, "seconds": self.seconds}
        save_checkpoint(state, self.checkpoint)

    def resume(self) -> bool:
        """Go on from the checkpoint; ``False`` where there is none.

        Raises:
            DataError: It is damaged, or of other settings, data or another version.
        """
        path = self.checkpoint
        if not path.exists():
            return False
        saved = load_checkpoint(path)
        check_identity(path, saved["config"], self.identity)
        self._check_structure(saved)
        if saved["best"] is not None:
            restore_model(path, self.model, saved["best"]["model"])  # verified here, used by run()
        restore_model(path, self.model, saved["model"])
        restore_optimizer(path, self.optimizer, self.model, saved.get("optimizer"))
        if self.scheduler is not None:
            restore_scheduler(path, self.scheduler, saved["scheduler"])
        self.history, self.best = saved["history"], saved["best"]
        if self.pace.save_every is not None:
            self._restore_within_epoch(saved)
        return True

    def _check_structure(self, saved: dict[str, Any]) -> None:
        fail = failing(self.checkpoint)
        check_progress(self.checkpoint, saved, self.monitor)
        epochs = len(saved["history"])
        saved = {"epoch": epochs, **saved}  # earlier versions left it out for some models
        check(saved, {"epoch": int}, fail)
        if saved["epoch"] != epochs:
            got = f"{epochs} as in its history, got {saved['epoch']}"
            raise fail(f"expected epoch to be {got}")
        if self.scheduler is not None:
            check(saved, {"scheduler": {str: object}}, fail)
        if self.pace.save_every is not None:
            check(saved, _WITHIN_EPOCH, fail)

    def _restore_within_epoch(self, saved: dict[str, Any]) -> None:
        restore_random_state(self.checkpoint, self.ranks.device, saved["random"])
        running = saved["running"]
        self.done, self.seconds = running["done"], running["seconds"]
        with restoring(self.checkpoint, "sums"):
            loss, samples, norm = running["sums"].tolist()
            if self.ranks.first:  # they are sums over all processes
                self.loss_sum.fill_(loss)
                self.norm_sum.fill_(norm)
                self.samples = int(samples)
        try:
            self.source.load_state_dict(saved["cursor"])
        except DataError as error:
            raise DataError(f"{self.checkpoint}: {error}") from error


def check_identity(path: Path, saved: dict[str, Any], identity: dict[str, Any]) -> None:
    """Check that the config ``saved`` in a checkpoint is that of a run, as far as it must be.

    Raises:
        DataError: It has another value; the message names it.
    """
    for name, value in identity.items():
        if name not in _MAY_CHANGE and saved.get(name) != value:
            raise DataError(
                f"{path}: was trained with {name}={saved.get(name)!r}, this run has {value!r}. "
                "Give the same to continue it, --overwrite to start again and replace it, or "
                "another --out folder"
            )


def _scheduler(optimizer: torch.optim.Optimizer, pace: Pace) -> ReduceLROnPlateau | None:
    if pace.plateau is None:
        return None
    return ReduceLROnPlateau(
        optimizer,
        mode="max",
        factor=pace.reduce,
        patience=pace.plateau,
        threshold=0.0,
        min_lr=pace.least_rate,
        eps=0.0,
    )
