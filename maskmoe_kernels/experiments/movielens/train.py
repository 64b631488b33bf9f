"""MovieLens-1M, end to end: three models, their ranking metrics, and who decides (section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from maskmoe_kernels.experiments.movielens import EVERY_MODEL, MODELS, WIDTHS
from maskmoe_kernels.experiments.movielens.baselines import most_popular
from maskmoe_kernels.experiments.movielens.data.ranking import Task
from maskmoe_kernels.experiments.movielens.data.reader import read_movielens
from maskmoe_kernels.experiments.movielens.evaluate import (
    CONFIDENCE,
    evaluate,
    print_report,
    scores,
)
from maskmoe_kernels.experiments.movielens.figures import draw, draw_contributions
from maskmoe_kernels.experiments.movielens.sufficient import (
    contributions,
    evaluate_sufficient,
)
from maskmoe_kernels.experiments.shared import plot_style
from maskmoe_kernels.experiments.shared.checkpoint import load_checkpoint
from maskmoe_kernels.experiments.shared.output import print_record, print_written
from maskmoe_kernels.experiments.shared.ranks import Ranks
from maskmoe_kernels.experiments.shared.report import machine, write_json
from maskmoe_kernels.experiments.shared.source import TensorSource
from maskmoe_kernels.experiments.shared.trainer import Pace, Run, Trainer, check_identity
from maskmoe_kernels.files import claim
from maskmoe_kernels.models import NCF, InterpretableNCF, NCFSizes

#: Table 1 of the paper: HR@10 and NDCG@10.
PAPER = {
    "content": (0.386, 0.218),
    "black-box": (0.715, 0.438),
    "interpretable": (0.678, 0.406),
}
_OF_EXPERTS = ("interpretable", "sufficient")
#: Validation metric whose best epoch is kept.
MONITOR = "NDCG@10"


@dataclass(frozen=True)
class Options:
    """Settings of one run; see ``maskmoe movielens --help``.

    Attributes:
        models: Which of ``EVERY_MODEL``.
        epochs: Most epochs of each model.
        patience: Epochs without a better validation NDCG@10 before a model stops.
        batch_size: Samples per step.
        seed: Of split, negatives, order and initial weights.
        embeddings: ``"shared"`` or ``"strict"``; see :class:`InterpretableNCF`.
        widths: Of the experts, one of ``WIDTHS``; ``None``: ``"largest"`` for the model
            ``"sufficient"``, whose prediction is that of the expert that sees all, else
            ``"equal"``.
        device: Where to train.
        resume: Go on from the checkpoints that ``out`` holds.
        sharpness: Of the smaller experts' confidence; ``None``: chosen on validation items.
        max_loss: What that choice may lose of either metric; see :func:`choose_sharpness`.
    """

    models: Sequence[str] = MODELS["sufficient"]
    epochs: int = 20
    patience: int = 5
    batch_size: int = 256
    seed: int = 0
    embeddings: str = "shared"
    widths: str | None = None
    device: str = "cpu"
    resume: bool = False
    sharpness: float | None = None
    max_loss: float = 0.01


def build(
    name: str, sizes: NCFSizes, embeddings: str = "shared", widths: str | None = None
) -> NCF | InterpretableNCF:
    """One of ``EVERY_MODEL``, freshly initialised; see :class:`Options` for the rest.

    Raises:
        ValueError: Another name, or other widths.
    """
    if name not in EVERY_MODEL:
        raise ValueError(f"model must be one of {list(EVERY_MODEL)}, got {name!r}")
    if name in _OF_EXPERTS:
        return InterpretableNCF(sizes, WIDTHS[_widths(name, widths)], embeddings)
    return NCF(sizes, personal=name == "black-box")


def _widths(name: str, given: str | None) -> str:
    if given is not None and given not in WIDTHS:
        raise ValueError(f"widths must be one of {list(WIDTHS)} or None, got {given!r}")
    return given or ("largest" if name == "sufficient" else "equal")


def run_movielens(
    path: Path,
    out: Path,
    options: Options,
    negatives: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train what is asked for, evaluate, write ``report.json`` and the figures into ``out``.

    Args:
        path: MovieLens-1M; see :func:`read_movielens`.
        out: Folder of checkpoints, report and figures; made if missing.
        options: See :class:`Options`.
        negatives: Fixed test negatives; see :func:`read_fixed_negatives`. ``None`` draws them.
        console: For progress and tables; ``None`` is quiet.

    Returns:
        The report. All of it but the speeds follows from the data and the options.

    Raises:
        DataError: Damaged data, or a checkpoint of another configuration.
        FloatingPointError: Training diverged.
        OSError: ``out`` is no folder that can be written to.
    """
    claim(out)
    if options.resume:
        _check_checkpoints(out, options)
    task = Task(read_movielens(path), options.seed, negatives, options.device)
    report = _opening_report(task, path, negatives, options)
    if console is not None:
        fields = {f"test {name}": f"{value:.3f}" for name, value in report["most_popular"].items()}
        if task.fixed_negatives:
            fields["(known: 0.453, 0.254 with these negatives)"] = ""
        print_record(console, "most popular movies", fields)
    for name in options.models:
        model, run = train(name, task, out, options, console)
        report["models"][name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "best_epoch": run.best_epoch,
            "history": run.history,
            "paper": dict(zip(("HR@10", "NDCG@10"), PAPER.get(name, ()), strict=False)),
            **_evaluated(name, model, task, options),
        }
        write_json(out / "report.json", report)
        if name == "sufficient" and plot_style.unsupported_reason() is None:
            _draw_contributions(model, task, out)
    missing = draw(report, out)
    if console is not None:
        print_report(report, console)
        print_written(console, "checkpoints, report", "figures", out, missing)
    return report


def _draw_contributions(model: nn.Module, task: Task, out: Path) -> None:
    if isinstance(model, InterpretableNCF):
        logits = task.list_logits(model, task.test_lists).double()
        draw_contributions(model.family, contributions(model, logits), out)


def _evaluated(name: str, model: nn.Module, task: Task, options: Options) -> dict[str, Any]:
    if name == "sufficient" and isinstance(model, InterpretableNCF):
        return evaluate_sufficient(model, task)
    return evaluate(model, task, options.sharpness, options.max_loss)


def _check_checkpoints(out: Path, options: Options) -> None:
    """Check before any work that the checkpoints in ``out`` are of the same settings."""
    for name in options.models:
        path = out / f"{name}.pt"
        if path.exists():
            check_identity(path, load_checkpoint(path)["config"], _identity(name, options))


def _identity(name: str, options: Options) -> dict[str, Any]:
    pace = _pace(options)
    return {
        "model": name,
        "epochs": pace.epochs,
        "patience": pace.patience,
        "batch_size": options.batch_size,
        "learning_rate": pace.learning_rate,
        "seed": options.seed,
        "monitor": MONITOR,
        "options": _options_of_experts(name, options) if name in _OF_EXPERTS else "",
    }


def _options_of_experts(name: str, options: Options) -> str:
    return f"embeddings={options.embeddings}, widths={_widths(name, options.widths)}"


def _pace(options: Options) -> Pace:
    return Pace(epochs=options.epochs, patience=options.patience)


def _opening_report(
    task: Task, path: Path, negatives: Path | None, options: Options
) -> dict[str, Any]:
    popular = most_popular(task.split, task.data.num_items)[task.test_lists]
    return {
        "experiment": "MovieLens-1M, leave one out, 1 positive among 99 negatives",
        "machine": machine(),
        "options": {
            "data": path.resolve().name,
            "negatives": None if negatives is None else negatives.name,
            **vars(options),
            "models": list(options.models),
            "widths": "auto" if options.widths is None else options.widths,
            "sharpness": "auto" if options.sharpness is None else options.sharpness,
        },
        "fixed_negatives": task.fixed_negatives,
        "most_popular": task.ranking(popular, task.test_lists),
        "models": {},
    }


def train(
    name: str, task: Task, out: Path, options: Options, console: Console | None = None
) -> tuple[nn.Module, Run]:
    """Train one of ``EVERY_MODEL``, or load what ``options.resume`` finds finished."""
    torch.manual_seed(options.seed)
    model = build(name, task.sizes, options.embeddings, options.widths).to(task.device)

    def loss_of(users: Tensor, items: Tensor, target: Tensor) -> Tensor:
        if name == "sufficient" and isinstance(model, InterpretableNCF):
            return model.gem_loss(*task.inputs(users, items), target, weighting="uniform")
        if isinstance(model, InterpretableNCF):
            return model.gem_loss(
                *task.inputs(users, items),
                target,
                confidence=CONFIDENCE,
                weighting="deselection",
                normalize="expert",
            )
        return F.binary_cross_entropy_with_logits(task.logits(model, users, items)[:, 0], target)

    def validate() -> dict[str, float]:
        logits = task.list_logits(model, task.validation_lists)
        ranked = scores(model, logits, mixes=name != "sufficient")
        return task.ranking(ranked, task.validation_lists)

    trainer = Trainer(
        model,
        TensorSource(lambda epoch: task.epoch(options.seed, epoch), options.batch_size),
        lambda batch: loss_of(*batch),
        validate,
        _pace(options),
        _identity(name, options),
        out / f"{name}.pt",
        monitor=MONITOR,
        ranks=Ranks(task.device),
        console=console,
    )
    trainer.begin(options.resume)
    return model, trainer.run()
