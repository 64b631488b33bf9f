"""Trains a model of skip prediction on shards of sessions (section 4.3)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.ranks import Ranks
from maskmoe_kernels.experiments.shared.report import machine, write_json
from maskmoe_kernels.experiments.shared.trainer import Run, Trainer
from maskmoe_kernels.experiments.skip.data.sessions import SessionDataset, SessionLoader
from maskmoe_kernels.experiments.skip.data.shards import Shards
from maskmoe_kernels.experiments.skip.loss import loss_part
from maskmoe_kernels.experiments.skip.metrics import SkipTally
from maskmoe_kernels.experiments.skip.models import build, logits_of, probability
from maskmoe_kernels.experiments.skip.pace import MONITOR, Pace
from maskmoe_kernels.experiments.skip.runs import CHECKPOINT, EXPERIMENT, REPORT
from maskmoe_kernels.experiments.skip.settings import Settings
from maskmoe_kernels.experiments.skip.source import SessionSource
from maskmoe_kernels.files import claim
from maskmoe_kernels.models.sessions import SessionModel


@dataclass(frozen=True)
class Means:
    """How a run is carried out. Its results do not depend on it, except for rounding.

    Attributes:
        workers: Processes that prepare batches.
        resume: Whether to resume from a checkpoint in the folder of the run.
        compile: Whether to compile the model with ``torch.compile``.
    """

    workers: int = 0
    resume: bool = False
    compile: bool = False


def train(
    data: Path,
    out: Path,
    settings: Settings,
    pace: Pace | None = None,
    means: Means | None = None,
    ranks: Ranks | None = None,
    console: Console | None = None,
) -> tuple[SessionModel, Run]:
    """Train a model on prepared shards; write checkpoint and report into ``out``.

    Args:
        data: The folder of shards, as :func:`prepare` wrote it.
        out: The folder of the run; made if missing.
        settings: What to train.
        pace: How long and how fast to train.
        means: How to carry out the run.
        ranks: The processes; ``None``: this one alone, on the CPU.
        console: Where progress is shown; ``None`` is quiet.

    Returns:
        The model with its best weights, and the run.

    Raises:
        DataError: The shards are missing or damaged, the batches are too small for the processes,
            or the checkpoint in ``out`` is of other settings or data.
        FloatingPointError: Training diverged.
        OSError: ``out`` is no folder that can be written to.
    """
    pace, means = pace or Pace(), means or Means()
    ranks = ranks or Ranks(torch.device("cpu"))
    training, held_out = _open_data(data, out, settings, ranks)
    shards = training.shards
    users = shards.embedded if shards.schema.embedding else 1
    model = build(settings, shards.schema, users, ranks.sums_sparse).to(ranks.device)
    if means.compile:
        model.compile()
    net = ranks.parallel(model)
    identity = _identity(settings, pace, shards, users)

    def report(history: list[dict[str, float]]) -> None:
        write_json(out / REPORT, _report(model, training, identity, pace, means, ranks, history))

    on_gpu = ranks.device.type == "cuda"
    loader = SessionLoader(training, workers=means.workers, pin_memory=on_gpu)
    trainer = Trainer(
        model,
        SessionSource(loader, ranks.device, pace.steps),
        lambda batch: loss_part(model, logits_of(net, batch, settings), batch, settings, ranks),
        lambda: validate(model, settings, held_out, ranks),
        pace,
        identity,
        out / CHECKPOINT,
        monitor=MONITOR,
        ranks=ranks,
        console=console,
        report=report,
    )
    trainer.begin(means.resume)
    return model, trainer.run()


@torch.no_grad()
def validate(
    model: SessionModel, settings: Settings, data: SessionDataset, ranks: Ranks
) -> dict[str, float]:
    """The metrics of a model over the sessions of all processes.

    Args:
        model: The model.
        settings: What it was built from.
        data: This process's share of the sessions.
        ranks: The processes.
    """
    tally = SkipTally()
    tally.sums = tally.sums.to(ranks.device)
    for batch in data:
        batch = batch.to(ranks.device, non_blocking=True)
        predicted = probability(model, logits_of(model, batch, settings), settings) > 0.5
        tally.add(predicted == (batch.target > 0.5), ~batch.second_padding)
    tally.sums = ranks.sum(tally.sums)
    return tally.metrics()


def _open_data(
    data: Path, out: Path, settings: Settings, ranks: Ranks
) -> tuple[SessionDataset, SessionDataset]:
    """Check the folder of the run, and open this process's share of the training and the
    validation sessions.
    """
    if settings.batch_size < 2 * ranks.world:
        raise DataError(
            f"a batch of {settings.batch_size} sessions cannot be shared by {ranks.world} "
            f"processes; give --batch {2 * ranks.world} or more"
        )
    if ranks.first:
        claim(out)
    share = {"rank": ranks.rank, "world": ranks.world}
    training = SessionDataset(
        Shards(data, "train"), settings.batch_size, seed=settings.seed, **share
    )
    held_out = SessionDataset(Shards(data, "valid"), max(settings.batch_size, 512), **share)
    return training, held_out


def _identity(settings: Settings, pace: Pace, shards: Shards, users: int) -> dict[str, Any]:
    """What a checkpoint must agree with to be resumed: all that changes the weights of a step."""
    # A resumed run may end or save at other steps, so these three may differ.
    free = ("epochs", "patience", "save_every")
    kept = {name: value for name, value in asdict(pace).items() if name not in free}
    data = {"data": shards.digest, "schema": shards.schema.text, "users": users}
    return {"experiment": EXPERIMENT, **asdict(settings), **kept, **data}


def _report(
    model: nn.Module,
    data: SessionDataset,
    identity: dict[str, Any],
    pace: Pace,
    means: Means,
    ranks: Ranks,
    history: list[dict[str, float]],
) -> dict[str, Any]:
    return {
        "settings": {**identity, "schema": data.shards.schema.name},
        "pace": asdict(pace),
        "means": {**asdict(means), "device": ranks.device.type, "processes": ranks.world},
        "machine": machine(),
        "sessions": len(data.shards),
        "parameters": sum(p.numel() for p in model.parameters()),
        "history": history,
    }
