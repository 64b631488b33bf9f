"""A training loop whose every epoch can be the last: best epoch kept, resumable, atomic."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.checkpoint import (
    CHECKPOINT_FORMAT,
    check_progress,
    failing,
    load_checkpoint,
    restore_model,
    restore_optimizer,
    save_checkpoint,
)
from maskmoe_kernels.experiments.shared.structure import check

Batch = tuple[Tensor, ...]
Metrics = dict[str, float]


@dataclass(frozen=True)
class TrainConfig:
    """How to train; part of a checkpoint, so that a run resumes only what it was.

    Attributes:
        model: Name of the model.
        epochs: Most epochs to train.
        patience: Epochs without a better validation metric before training stops.
        batch_size: Samples per step.
        learning_rate: Adam's.
        seed: Of initial weights, negatives and order.
        monitor: Validation metric whose best epoch is kept (larger is better).
        options: Anything else that changes the result, as text.
    """

    model: str
    epochs: int = 20
    patience: int = 5
    batch_size: int = 256
    learning_rate: float = 1e-3
    seed: int = 0
    monitor: str = "NDCG@10"
    options: str = ""

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "batch_size"):
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


def fit(
    model: nn.Module,
    epoch_of: Callable[[int], Batch],
    loss_of: Callable[..., Tensor],
    validate: Callable[[], Metrics],
    config: TrainConfig,
    checkpoint: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> Run:
    """Train with Adam, validate after each epoch, keep the best one.

    Everything random in epoch e must follow from ``(config.seed, e)``: a resumed run then ends
    with the weights of an undisturbed one.

    Args:
        model: Trained in place; holds the best epoch's weights afterwards.
        epoch_of: Epoch number (from 1) to tensors of all its samples, in order.
        loss_of: Batch of those tensors to scalar loss.
        validate: Metrics of the model as it is, larger is better.
        config: See :class:`TrainConfig`.
        checkpoint: Written after each epoch, atomically.
        resume: Go on from ``checkpoint`` if it is there. One that holds as many epochs as
            ``config`` asks for, or more, is used as it stands.
        console: Where progress and one line per epoch go; ``None`` is quiet.

    Raises:
        DataError: The checkpoint is damaged or of another configuration.
        FloatingPointError: The loss, a weight or a metric is not finite. The checkpoint then
            still holds the last epoch that was.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
    state: dict[str, Any] = {"epoch": 0, "history": [], "best": None}
    if resume and checkpoint.exists():
        state = _restore(checkpoint, model, optimizer, config)
    if console is not None and checkpoint.exists():
        console.print(_opening_line(config, checkpoint, state["epoch"]), highlight=False)
    while not _finished(state, config):
        epoch = state["epoch"] + 1
        started = time.perf_counter()
        model.train()
        loss, samples = _train_epoch(
            model, optimizer, epoch, epoch_of(epoch), loss_of, config, console
        )
        seconds = time.perf_counter() - started
        metrics = _validated(model, validate, config, epoch)
        record = {"epoch": epoch, "train_loss": loss, "samples_per_s": samples / seconds, **metrics}
        _keep(state, record, metrics, model, config.monitor)
        _save(checkpoint, model, optimizer, config, state)
        if console is not None:
            console.print(_epoch_line(config, record, state, seconds), highlight=False)
    best = state["best"]
    model.load_state_dict(best["model"])
    model.eval()
    return Run(state["history"], best["epoch"], best["metrics"], best["model"])


def _finished(state: dict[str, Any], config: TrainConfig) -> bool:
    if state["epoch"] >= config.epochs:
        return True
    best = state["best"]
    return best is not None and state["epoch"] - best["epoch"] >= config.patience


def _keep(
    state: dict[str, Any],
    record: dict[str, float],
    metrics: Metrics,
    model: nn.Module,
    monitor: str,
) -> None:
    """Note an epoch in ``state``, and the weights if no earlier one was as good."""
    state["epoch"] = int(record["epoch"])
    state["history"].append(record)
    best = state["best"]
    if best is None or metrics[monitor] > best["metrics"][monitor]:
        weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        state["best"] = {"epoch": state["epoch"], "metrics": metrics, "model": weights}


def _save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    state: dict[str, Any],
) -> None:
    checkpoint = {
        "format": CHECKPOINT_FORMAT,
        "config": dataclasses.asdict(config),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        **state,
    }
    save_checkpoint(checkpoint, path)


def _restore(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> dict[str, Any]:
    saved = load_checkpoint(path)
    for name, value in dataclasses.asdict(config).items():
        # More epochs, or more patience, only go further on the same way.
        if name not in ("epochs", "patience") and saved["config"].get(name) != value:
            raise DataError(
                f"{path}: was trained with {name}={saved['config'].get(name)!r}, this run has "
                f"{value!r}; use the same, or another --out folder"
            )
    check_progress(path, saved, config.monitor)
    check(saved, {"epoch": int}, failing(path))
    if saved["epoch"] != len(saved["history"]):
        got = f"{len(saved['history'])} as in its history, got {saved['epoch']}"
        raise failing(path)(f"expected epoch to be {got}")
    if saved["best"] is not None:
        restore_model(path, model, saved["best"]["model"])  # which the run ends with
    restore_model(path, model, saved["model"])
    restore_optimizer(path, optimizer, saved.get("optimizer"))
    return {key: saved[key] for key in ("epoch", "history", "best")}


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    samples: Batch,
    loss_of: Callable[..., Tensor],
    config: TrainConfig,
    console: Console | None,
) -> tuple[float, int]:
    """Mean loss of the epoch and its number of samples."""
    count, size = len(samples[0]), config.batch_size
    total = torch.zeros((), dtype=torch.float64, device=samples[0].device)
    started = time.perf_counter()
    with progress_bar(console) as progress:
        name = f"{config.model} {epoch}/{config.epochs}"
        task = progress.add_task(name, total=-(-count // size), speed="")
        for step, start in enumerate(range(0, count, size), start=1):
            batch = tuple(part[start : start + size] for part in samples)
            optimizer.zero_grad()  # first, so that new gradients lie where the old ones were
            loss = loss_of(*batch)
            loss.backward()
            optimizer.step()
            total.add_(loss.detach(), alpha=len(batch[0]))
            if step % 200 == 0:
                _check_finite("loss", float(total), config, epoch)
            if step % 50 == 0 and not progress.disable:
                done = min(step * size, count)
                speed = done / (time.perf_counter() - started)
                text = f"loss {float(total) / done:.4f}  {speed:,.0f} samples/s"
                progress.update(task, completed=step, speed=text)
    # The steps after the last check may have lost it, too.
    _check_finite("loss", float(total), config, epoch)
    return float(total) / count, count


def _validated(
    model: nn.Module, validate: Callable[[], Metrics], config: TrainConfig, epoch: int
) -> Metrics:
    """Metrics after an epoch; weights and metrics are finite."""
    # A finite loss may still have had a gradient that was not.
    for name, value in model.named_parameters():
        if not bool(value.isfinite().all()):
            _check_finite(f"weight {name}", math.nan, config, epoch)
    model.eval()
    metrics = validate()
    for name, number in metrics.items():
        _check_finite(name, number, config, epoch)
    return metrics


def _check_finite(what: str, value: float, config: TrainConfig, epoch: int) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"{config.model}: the {what} is no longer finite in epoch {epoch}; lower the learning "
            f"rate ({config.learning_rate:g}) and check the inputs. This epoch is not kept"
        )


def progress_bar(console: Console | None) -> Progress:
    """A bar of steps with a free text ``speed``; hidden where there is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=console,
        disable=console is None or not console.is_terminal,
        transient=True,
    )


def _opening_line(config: TrainConfig, checkpoint: Path, epoch: int) -> str:
    if epoch:
        return f"{config.model}: going on after epoch {epoch} of {checkpoint}"
    return f"{config.model}: starting afresh, {checkpoint} will be replaced"


def _epoch_line(
    config: TrainConfig, record: dict[str, float], state: dict[str, Any], seconds: float
) -> str:
    hidden = ("epoch", "samples_per_s")
    metrics = "  ".join(
        f"{name} {value:.4f}" for name, value in record.items() if name not in hidden
    )
    best = state["best"]["epoch"]
    kept = "kept" if best == record["epoch"] else f"best is epoch {best}"
    # Patience may end it before config.epochs.
    most = min(config.epochs, best + config.patience) - state["epoch"]
    left = "" if most < 1 else f", {duration(most * seconds)} left if none is better"
    speed = f"{record['samples_per_s']:,.0f} samples/s"
    name = f"{config.model}: epoch {state['epoch']}/{config.epochs}"
    return f"{name}  {metrics}  {speed}  ({kept}{left})"


def duration(seconds: float) -> str:
    """In words, such as "90 s" or "12 min"."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
