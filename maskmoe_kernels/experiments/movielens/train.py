"""MovieLens-1M, end to end: three models, their ranking metrics, and who decides (section 4.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from maskmoe_kernels.experiments.movielens.baselines import most_popular
from maskmoe_kernels.experiments.movielens.data import read_movielens
from maskmoe_kernels.experiments.movielens.ranking import Task
from maskmoe_kernels.experiments.shared import figures
from maskmoe_kernels.experiments.shared.files import claim
from maskmoe_kernels.experiments.shared.ranks import Ranks
from maskmoe_kernels.experiments.shared.report import machine, sealed, write_json
from maskmoe_kernels.experiments.shared.source import TensorSource
from maskmoe_kernels.experiments.shared.trainer import Pace, Run, Trainer
from maskmoe_kernels.layout.subsets import SubsetFamily
from maskmoe_kernels.models import NCF, InterpretableNCF, NCFSizes
from maskmoe_kernels.ops.selection import mixture

MODELS = ("content", "black-box", "interpretable")
#: Table 1 of the paper: HR@10 and NDCG@10.
PAPER = {
    "content": (0.386, 0.218),
    "black-box": (0.715, 0.438),
    "interpretable": (0.678, 0.406),
}
#: Validation metric whose best epoch is kept.
MONITOR = "NDCG@10"
#: Powers tried for the smaller experts' confidence.
SHARPNESS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0)
#: The authors' confidence for rare positives, in training and in prediction.
CONFIDENCE = "rare"
#: What is read again of the report's interpretable model, and the checksum of it.
SEALED = ("sharpness", "chosen", "checksum")


@dataclass(frozen=True)
class Options:
    """Settings of one run; see ``maskmoe movielens --help``.

    Attributes:
        models: Which of ``MODELS``.
        epochs: Most epochs of each model.
        patience: Epochs without a better validation NDCG@10 before a model stops.
        batch_size: Samples per step.
        seed: Of split, negatives, order and initial weights.
        embeddings: ``"shared"`` or ``"strict"``; see :class:`InterpretableNCF`.
        device: Where to train.
        resume: Go on from the checkpoints that ``out`` holds.
        sharpness: Of the smaller experts' confidence; ``None``: chosen on validation items.
        max_loss: What that choice may lose of either metric; see :func:`choose_sharpness`.
    """

    models: Sequence[str] = MODELS
    epochs: int = 20
    patience: int = 5
    batch_size: int = 256
    seed: int = 0
    embeddings: str = "shared"
    device: str = "cpu"
    resume: bool = False
    sharpness: float | None = None
    max_loss: float = 0.01


def build(name: str, sizes: NCFSizes, embeddings: str = "shared") -> NCF | InterpretableNCF:
    """One of ``MODELS``, freshly initialised.

    Raises:
        ValueError: Another name.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {list(MODELS)}, got {name!r}")
    if name == "interpretable":
        return InterpretableNCF(sizes, embeddings=embeddings)
    return NCF(sizes, personal=name == "black-box")


def scores(model: nn.Module, logits: Tensor, sharpness: float = 1.0) -> Tensor:
    """What a model ranks by, ``(*,)`` float64: probability of the mixture, or the one logit."""
    if isinstance(model, InterpretableNCF):
        return mixture(logits.double(), model.family, CONFIDENCE, sharpness).probability
    return logits[..., 0].double()


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
    task = Task(read_movielens(path), options.seed, negatives, options.device)
    report = _opening_report(task, path, negatives, options)
    if console is not None:
        check = report["most_popular"]
        console.print(
            f"most popular: HR@10 {check['HR@10']:.3f}  NDCG@10 {check['NDCG@10']:.3f}"
            + ("  (known: 0.453, 0.254 with these negatives)" if task.fixed_negatives else ""),
            highlight=False,
        )
    for name in options.models:
        model, run = train(name, task, out, options, console)
        report["models"][name] = _evaluate(name, model, run, task, options)
        write_json(out / "report.json", report)
    missing = draw(report, out)
    if console is not None:
        print_report(report, console)
        console.print(f"no figures: {missing}" if missing else f"report and figures: {out}")
    return report


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
            "sharpness": "auto" if options.sharpness is None else options.sharpness,
        },
        "fixed_negatives": task.fixed_negatives,
        "most_popular": task.ranking(popular, task.test_lists),
        "models": {},
    }


def train(
    name: str, task: Task, out: Path, options: Options, console: Console | None = None
) -> tuple[nn.Module, Run]:
    """Train one of ``MODELS``, or load what ``options.resume`` finds finished."""
    torch.manual_seed(options.seed)
    model = build(name, task.sizes, options.embeddings).to(task.device)

    def loss_of(users: Tensor, items: Tensor, target: Tensor) -> Tensor:
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
        return task.ranking(scores(model, logits), task.validation_lists)

    pace = Pace(epochs=options.epochs, patience=options.patience)
    identity = {
        "model": name,
        "epochs": pace.epochs,
        "patience": pace.patience,
        "batch_size": options.batch_size,
        "learning_rate": pace.learning_rate,
        "seed": options.seed,
        "monitor": MONITOR,
        "options": f"embeddings={options.embeddings}" if name == "interpretable" else "",
    }
    trainer = Trainer(
        model,
        TensorSource(lambda epoch: task.epoch(options.seed, epoch), options.batch_size),
        lambda batch: loss_of(*batch),
        validate,
        pace,
        identity,
        out / f"{name}.pt",
        monitor=MONITOR,
        ranks=Ranks(task.device),
        console=console,
    )
    trainer.begin(options.resume)
    return model, trainer.run()


def _evaluate(
    name: str, model: nn.Module, run: Run, task: Task, options: Options
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "best_epoch": run.best_epoch,
        "history": run.history,
        "paper": dict(zip(("HR@10", "NDCG@10"), PAPER[name], strict=True)),
    }
    test = task.list_logits(model, task.test_lists)
    if not isinstance(model, InterpretableNCF):
        result["test"] = task.ranking(scores(model, test), task.test_lists)
        return result
    held = task.list_logits(model, task.validation_lists)
    points = [_frontier_point(model, task, held, test, power) for power in SHARPNESS]
    chosen = options.sharpness
    if chosen is None:
        chosen = choose_sharpness(points, options.max_loss)
    elif chosen not in SHARPNESS:
        points.append(_frontier_point(model, task, held, test, chosen))
        points.sort(key=lambda p: p["sharpness"])
    point = next(p for p in points if p["sharpness"] == chosen)
    how = "given" if options.sharpness is not None else f"max loss {options.max_loss}"
    largest = model.family.membership.sum(1).argmax()
    result |= {
        "family": {
            "groups": dict(model.family.groups),
            "subsets": {name: list(of) for name, of in model.family.subsets.items()},
        },
        "frontier": points,
        **sealed({"sharpness": chosen, "chosen": how}),
        "test": point["test"],
        "decided": point["decided"],
        "mean_attribution": point["mean_attribution"],
        "largest_expert_alone": task.ranking(test[..., largest].double(), task.test_lists),
    }
    return result


def _frontier_point(
    model: InterpretableNCF, task: Task, held: Tensor, test: Tensor, sharpness: float
) -> dict[str, Any]:
    """Metrics and attribution over the positives at one sharpness."""
    point: dict[str, Any] = {"sharpness": sharpness}
    for which, logits, lists in (
        ("validation", held, task.validation_lists),
        ("test", test, task.test_lists),
    ):
        point[which] = task.ranking(scores(model, logits, sharpness), lists)
    share = mixture(test[:, 0].double(), model.family, CONFIDENCE, sharpness).attribution
    names = model.family.names
    decided = torch.bincount(share.argmax(1), minlength=len(names)) / len(share)
    point["decided"] = dict(zip(names, decided.tolist(), strict=True))
    point["mean_attribution"] = dict(zip(names, share.mean(0).tolist(), strict=True))
    return point


def choose_sharpness(points: Sequence[Mapping[str, Any]], max_loss: float) -> float:
    """Smallest sharpness whose validation HR@10 and NDCG@10 lose at most ``max_loss``.

    Loss is counted from the best point of the frontier, for each metric.

    Args:
        points: Frontier, each with ``sharpness`` and ``validation`` metrics.
        max_loss: Largest accepted loss of either metric, e.g. 0.01.
    """
    best = {key: max(p["validation"][key] for p in points) for key in ("HR@10", "NDCG@10")}
    good = [
        float(p["sharpness"])
        for p in points
        if all(p["validation"][key] >= top - max_loss for key, top in best.items())
    ]
    if good:
        return min(good)
    # Metrics peak at different points: with a tight max_loss none may satisfy both.
    return float(max(points, key=lambda p: p["validation"]["NDCG@10"])["sharpness"])


def draw(report: Mapping[str, Any], out: Path) -> str | None:
    """All figures of a report, as png files in ``out``.

    Returns:
        Why there are none, in words; ``None`` where they were drawn.
    """
    missing = figures.obstacle()
    if missing is not None:
        return missing
    histories = {name: model["history"] for name, model in report["models"].items()}
    figures.learning_curves(histories, out / "learning_curves.png")
    interpretable = report["models"].get("interpretable")
    if interpretable is None:
        return None
    figures.hasse(SubsetFamily(**interpretable["family"]), out / "hasse.png")
    _draw_frontier(report["models"], out)
    return None


def _draw_frontier(models: Mapping[str, Any], out: Path) -> None:
    """Figure 6 with the paper's mixing rule and with the chosen one; what lies between them."""
    interpretable, chosen = models["interpretable"], models["interpretable"]["sharpness"]
    for point in interpretable["frontier"]:
        if point["sharpness"] not in (1, chosen):
            continue
        plain = point["sharpness"] == 1
        figures.attribution_bars(
            list(point["decided"]),
            list(point["mean_attribution"].values()),
            list(point["decided"].values()),
            out / ("attribution.png" if plain else "attribution_chosen.png"),
            title=f"Which features decide? Sharpness {point['sharpness']:g}",
        )
    points = [
        {"sharpness": p["sharpness"], "decided": p["decided"], **_short_names(p["test"])}
        for p in interpretable["frontier"]
    ]
    black_box = models.get("black-box")
    levels = None if black_box is None else _short_names(black_box["test"])
    figures.frontier(points, chosen, out / "frontier.png", levels)


def _short_names(metrics: Mapping[str, float]) -> dict[str, float]:
    return {"hr": metrics["HR@10"], "ndcg": metrics["NDCG@10"]}


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """The table beside the paper's table 1, and the frontier."""
    table = Table(title="MovieLens-1M (test)")
    for column in ("model", "parameters", "HR@10", "NDCG@10", "paper HR@10", "paper NDCG@10"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, model in report["models"].items():
        cells = [model["test"]["HR@10"], model["test"]["NDCG@10"], *model["paper"].values()]
        table.add_row(name, f"{model['parameters']:,}", *(f"{value:.3f}" for value in cells))
    console.print(table)
    interpretable = report["models"].get("interpretable")
    if interpretable is None:
        return
    names = list(interpretable["mean_attribution"])
    alone = interpretable["largest_expert_alone"]
    table = Table(
        title="Interpretable: metrics (test), and what each expert holds, over sharpness",
        caption="Experts: share of test items decided / mean attribution. "
        f"* {interpretable['chosen']}. The largest expert alone: HR@10 {alone['HR@10']:.3f}, "
        f"NDCG@10 {alone['NDCG@10']:.3f}.",
    )
    for column in ("sharpness", "HR@10", "NDCG@10", *names):
        table.add_column(column, justify="right")
    for point in interpretable["frontier"]:
        mark = " *" if point["sharpness"] == interpretable["sharpness"] else ""
        table.add_row(
            f"{point['sharpness']:g}{mark}",
            *(f"{value:.3f}" for value in point["test"].values()),
            *(f"{point['decided'][n]:.2f}/{point['mean_attribution'][n]:.2f}" for n in names),
        )
    console.print(table)
