"""A training loop whose every epoch can be the last: best epoch kept, resumable, atomic."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
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

CHECKPOINT_FORMAT = 1

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


@dataclass
class Run:
    """What training leaves: the history of all epochs and the best one's metrics and weights."""

    history: list[dict[str, float]]
    best_epoch: int
    best: Metrics
    state: dict[str, Tensor]


def save_atomically(obj: Any, path: Path) -> None:
    """``torch.save`` that leaves either the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    try:
        torch.save(obj, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint written by :func:`fit`.

    Raises:
        DataError: Missing, damaged, or of another format.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"{path}: no such checkpoint; train a model first") from None
    except Exception as error:
        raise DataError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); it may be damaged or "
            "another kind of file"
        ) from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise DataError(
            f"{path}: expected a checkpoint of format {CHECKPOINT_FORMAT}; train again with this "
            "version"
        )
    return checkpoint


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
        resume: Go on from ``checkpoint`` if it is there.
        console: Where progress and one line per epoch go; ``None`` is quiet.

    Raises:
        DataError: The checkpoint is damaged or of another configuration.
        FloatingPointError: The loss is not finite.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
    state: dict[str, Any] = {"epoch": 0, "history": [], "best": None}
    if resume and checkpoint.exists():
        state = _restore(checkpoint, model, optimizer, config)
    while not _finished(state, config):
        epoch = state["epoch"] + 1
        started = time.perf_counter()
        loss, samples = _train_epoch(model, optimizer, epoch_of(epoch), loss_of, config, console)
        seconds = time.perf_counter() - started
        model.eval()
        metrics = validate()
        model.train()
        record = {"epoch": epoch, "train_loss": loss, "samples_per_s": samples / seconds, **metrics}
        state["epoch"] = epoch
        state["history"].append(record)
        if state["best"] is None or metrics[config.monitor] > state["best"]["metrics"][config.monitor]:
            weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
            state["best"] = {"epoch": epoch, "metrics": metrics, "model": weights}
        if console is not None:
            console.print(_epoch_line(config, record, state["best"]["epoch"]))
        save_atomically(
            {
                "format": CHECKPOINT_FORMAT,
                "config": dataclasses.asdict(config),
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                **state,
            },
            checkpoint,
        )
    best = state["best"]
    model.load_state_dict(best["model"])
    model.eval()
    return Run(state["history"], best["epoch"], best["metrics"], best["model"])


def _finished(state: dict[str, Any], config: TrainConfig) -> bool:
    if state["epoch"] >= config.epochs:
        return True
    best = state["best"]
    return best is not None and state["epoch"] - best["epoch"] >= config.patience


def _restore(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> dict[str, Any]:
    saved = load_checkpoint(path)
    for name, value in dataclasses.asdict(config).items():
        # More epochs, or more patience, only go further on the same way.
        if name not in ("epochs", "patience") and saved["config"][name] != value:
            raise DataError(
                f"{path}: was trained with {name}={saved['config'][name]!r}, this run has "
                f"{value!r}; use the same, or another --out folder"
            )
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return {key: saved[key] for key in ("epoch", "history", "best")}


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: Batch,
    loss_of: Callable[..., Tensor],
    config: TrainConfig,
    console: Console | None,
) -> tuple[float, int]:
    """Mean loss of the epoch and its number of samples."""
    count = len(samples[0])
    total = torch.zeros((), dtype=torch.float64)
    for step, batch in _batches(samples, config, console):
        loss = loss_of(*batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.detach().double().cpu() * len(batch[0])
        if step % 200 == 0 and not math.isfinite(float(total)):
            raise FloatingPointError(
                f"the loss of {config.model} is no longer finite; lower the learning rate "
                f"({config.learning_rate}) and check the inputs"
            )
    return float(total) / count, count


def _batches(
    samples: Batch, config: TrainConfig, console: Console | None
) -> Iterator[tuple[int, Batch]]:
    count, size = len(samples[0]), config.batch_size
    steps = -(-count // size)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=console,
        disable=console is None or not console.is_terminal,
        transient=True,
    )
    started = time.perf_counter()
    with progress:
        task = progress.add_task(config.model, total=steps, speed="")
        for step, start in enumerate(range(0, count, size)):
            yield step, tuple(part[start : start + size] for part in samples)
            if step % 50 == 49:
                speed = (step + 1) * size / (time.perf_counter() - started)
                progress.update(task, completed=step + 1, speed=f"{speed:,.0f} samples/s")


def _epoch_line(config: TrainConfig, record: dict[str, float], best_epoch: int) -> str:
    metrics = "  ".join(
        f"{name} {value:.4f}"
        for name, value in record.items()
        if name not in ("epoch", "samples_per_s")
    )
    kept = "kept" if best_epoch == record["epoch"] else f"best is epoch {best_epoch}"
    return (
        f"{config.model}: epoch {record['epoch']}/{config.epochs}  {metrics}  "
        f"{record['samples_per_s']:,.0f} samples/s  ({kept})"
    )
