"""Skip prediction (section 4.3): four models, trained on shards of sessions."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.checkpoint import (
    check_progress,
    failing,
    load_checkpoint,
    restore_model,
    restoring,
)
from maskmoe_kernels.experiments.shared.files import claim
from maskmoe_kernels.experiments.shared.metrics import SkipTally
from maskmoe_kernels.experiments.shared.ranks import Ranks
from maskmoe_kernels.experiments.shared.report import machine, write_json
from maskmoe_kernels.experiments.shared.structure import check
from maskmoe_kernels.experiments.shared.trainer import Run, Trainer
from maskmoe_kernels.experiments.skip.data.session_features import SessionBatch
from maskmoe_kernels.experiments.skip.data.sessions import SessionDataset, SessionLoader, Shards
from maskmoe_kernels.experiments.skip.trainer import MONITOR, Pace, SessionSource
from maskmoe_kernels.layout.families import skip_sessions
from maskmoe_kernels.models import GRU, InterpretableGRU, InterpretableTransformer, Transformer
from maskmoe_kernels.models.sessions import SessionExperts, SessionModel
from maskmoe_kernels.ops.selection import deselection, gem_loss, mixture, selection

MODELS = (
    "interpretable-transformer", "interpretable-gru", "black-box-transformer", "black-box-gru",
)  # fmt: skip
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
#: File of a run in its folder.
CHECKPOINT, REPORT = "checkpoint.pt", "report.json"


@dataclass(frozen=True)
class Settings:
    """All that decides the weights, next to the data and :class:`Pace`.

    Attributes:
        model: One of ``MODELS``.
        width: Units per expert; the black boxes have as many as all experts together.
        heads: Heads per expert, likewise; of the Transformers.
        layers: Blocks of encoder and decoder each; of a GRU, its layers.
        batch_size: Sessions of a step, over all processes.
        seed: Of initial weights and order.
        precision: ``float32``, or ``bfloat16``: autocast, weights stay in float32.
        confidence: Of the loss and of the prediction; see :func:`selection`.
        sharpness: Likewise.
        weighting: See :func:`gem_loss`.
        normalize: ``"none"``, ``"sample"`` or ``"batch"``; see :func:`gem_loss`.
    """

    model: str
    width: int = 16
    heads: int = 1
    layers: int = 3
    batch_size: int = 128
    seed: int = 0
    precision: str = "float32"
    confidence: str = "abs"
    sharpness: float = 1.0
    weighting: str = "deselection"
    normalize: str = "batch"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("model", self.model, MODELS),
            ("precision", self.precision, tuple(PRECISIONS)),
            ("normalize", self.normalize, ("none", "sample", "batch")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {list(known)}, got {value!r}")

    @property
    def interpretable(self) -> bool:
        """Does the model have experts?"""
        return self.model.startswith("interpretable")


@dataclass(frozen=True)
class Means:
    """With what a run is made; none of it decides the result but for rounding.

    Attributes:
        workers: Processes that prepare batches.
        resume: Go on from the checkpoint of the folder, if it has one.
        compile: Whether the model goes through ``torch.compile``.
    """

    workers: int = 0
    resume: bool = True
    compile: bool = False


def build(settings: Settings) -> SessionModel:
    """A model, freshly initialised from the seed; the state of torch's generator is moved."""
    torch.manual_seed(settings.seed)
    family, second = skip_sessions()
    width, heads, layers = settings.width, settings.heads, settings.layers
    if settings.model == "interpretable-transformer":
        return InterpretableTransformer(family, second, width, heads, layers)
    if settings.model == "interpretable-gru":
        return InterpretableGRU(family, second, width, layers)
    features = family.in_features, sum(second.values())
    experts = family.num_experts
    if settings.model == "black-box-transformer":
        return Transformer(*features, experts * width, experts * heads, layers)
    return GRU(*features, experts * width, layers)


def logits_of(net: nn.Module, batch: SessionBatch, settings: Settings) -> Tensor:
    """Logits, ``(B, 10, H)`` or of a black box ``(B, 10)``, float32."""
    dtype = PRECISIONS[settings.precision]
    device = batch.first.device.type
    with nullcontext() if dtype is None else torch.autocast(device, dtype):
        logits: Tensor = net(batch.first, batch.second, batch.first_padding, batch.second_padding)
    return logits.float()


def probability(model: SessionModel, logits: Tensor, settings: Settings) -> Tensor:
    """Of a skip, ``(B, 10)``: the mixture's, or the black box's own."""
    if isinstance(model, SessionExperts):
        return mixture(logits, model.family, settings.confidence, settings.sharpness).probability
    return logits.sigmoid()


def loss_part(
    model: SessionModel, logits: Tensor, batch: SessionBatch, settings: Settings, ranks: Ranks
) -> Tensor:
    """This process's part of the loss over all tracks of the batch of all processes.

    The parts are scaled such that their mean is the loss: each divides by what is known of its own
    share, tracks or weights, and is put in proportion to what all processes have of it.
    """
    real = ~batch.second_padding
    amount = real.sum().to(logits.dtype)
    if not isinstance(model, SessionExperts):
        each = F.binary_cross_entropy_with_logits(logits, batch.target, reduction="none")
        loss = each.masked_fill(batch.second_padding, 0).sum() / amount.clamp(min=1)
    else:
        options = model.family, settings.confidence
        normalize = None if settings.normalize == "none" else settings.normalize
        loss = gem_loss(
            logits, batch.target, *options, settings.weighting, normalize, real, settings.sharpness
        )
        if normalize == "batch" and ranks.world > 1:
            weigh = selection if settings.weighting == "selection" else deselection
            weights = weigh(logits.detach(), *options, settings.sharpness)
            amount = weights.masked_fill(batch.second_padding.unsqueeze(-1), 0).sum()
    if ranks.world == 1:
        return loss
    return loss * (ranks.world * amount / ranks.sum(amount).clamp(min=1e-12))


@torch.no_grad()
def tally(judge: Callable[[SessionBatch], Tensor], data: SessionDataset, ranks: Ranks) -> SkipTally:
    """Metrics of a judge over the sessions of all processes.

    Args:
        judge: Batch to probability of a skip, ``(B, 10)`` or to be expanded to it.
    """
    result = SkipTally()
    result.sums = result.sums.to(ranks.device)
    for batch in data:
        batch = batch.to(ranks.device, non_blocking=True)
        right = (judge(batch) > 0.5) == (batch.target > 0.5)
        result.add(right, ~batch.second_padding)
    result.sums = ranks.sum(result.sums)
    return result


def train(
    data: Path,
    out: Path,
    settings: Settings,
    pace: Pace | None = None,
    means: Means | None = None,
    ranks: Ranks | None = None,
    console: Console | None = None,
) -> tuple[SessionModel, Run]:
    """Train a model on prepared shards; checkpoint, report and learning curves go into ``out``.

    Args:
        data: As :func:`prepare` wrote it.
        out: Made if missing.
        settings: What to train.
        pace: How.
        means: With what.
        ranks: The processes; by default this one alone, on the CPU.
        console: For progress; ``None`` is quiet.

    Returns:
        The model with its best weights, and the run.

    Raises:
        DataError: The shards are missing or damaged, or the checkpoint in ``out`` is of other
            settings or data.
        FloatingPointError: Training diverged.
        OSError: ``out`` is no folder that can be written to.
    """
    pace, means = pace or Pace(), means or Means()
    ranks = ranks or Ranks(torch.device("cpu"))
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
    held = SessionDataset(Shards(data, "valid"), max(settings.batch_size, 512), **share)
    model = build(settings).to(ranks.device)
    if means.compile:
        model.compile()
    net = ranks.parallel(model)
    on_gpu = ranks.device.type == "cuda"
    # What a run is, for its checkpoint: the rate's schedule, but not where it ends.
    kept = {k: v for k, v in asdict(pace).items() if k not in ("epochs", "patience", "save_every")}
    identity = {"experiment": "skip", **asdict(settings), **kept, "data": training.shards.digest}

    def validate() -> dict[str, float]:
        def judge(batch: SessionBatch) -> Tensor:
            return probability(model, logits_of(model, batch, settings), settings)

        return tally(judge, held, ranks).metrics()

    def report(history: list[dict[str, float]]) -> None:
        write_json(out / REPORT, _report(model, training, identity, pace, means, ranks, history))

    loader = SessionLoader(training, workers=means.workers, pin_memory=on_gpu)
    trainer = Trainer(
        model,
        SessionSource(loader, ranks.device, pace.steps),
        lambda batch: loss_part(model, logits_of(net, batch, settings), batch, settings, ranks),
        validate,
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
        "settings": identity,
        "pace": asdict(pace),
        "means": {**asdict(means), "device": ranks.device.type, "processes": ranks.world},
        "machine": machine(),
        "sessions": len(data.shards),
        "parameters": sum(p.numel() for p in model.parameters()),
        "history": history,
    }


def load(folder: Path, device: torch.device | str = "cpu") -> tuple[SessionModel, Settings, Run]:
    """The model of a run, with its best weights, and what it was trained with.

    Args:
        folder: ``out`` of :func:`train`, or the checkpoint in it.
        device: Where the model shall be.

    Raises:
        DataError: No checkpoint, a damaged one, or one of another experiment or version.
    """
    path = folder / CHECKPOINT if folder.is_dir() else folder
    saved = load_checkpoint(path)
    config = saved["config"]
    if config.get("experiment") != "skip":
        raise DataError(f"{path}: expected a run of `maskmoe skip train`, got another experiment's")
    if saved["best"] is None:
        raise DataError(f"{path}: no epoch is finished yet; let `maskmoe skip train` go on")
    check_progress(path, saved, MONITOR)
    best = saved["best"]
    settings = _settings_of(path, config, best["model"])
    with restoring(path, "settings"):
        model = build(settings)
    restore_model(path, model, best["model"])
    run = Run(saved["history"], best["epoch"], best["metrics"], best["model"])
    return model.to(device).eval(), settings, run


def _settings_of(path: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Settings:
    """Settings that a checkpoint names, if they may be those of its weights."""
    kinds = get_type_hints(Settings)
    check(config, kinds, failing(path), "config")
    with restoring(path, "settings"):
        settings = Settings(**{name: config[name] for name in kinds})
    # Every layer has a square matrix: a model beyond that is not worth its memory.
    most = math.isqrt(sum(value.numel() for value in weights.values()))
    for name in ("width", "heads", "layers"):
        if not 1 <= getattr(settings, name) <= most:
            got = f"{getattr(settings, name)} for so few weights"
            raise failing(path)(f"expected config.{name} of 1 to {most}, got {got}")
    return settings
