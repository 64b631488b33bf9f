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

from maskmoe_kernels.experiments import figures
from maskmoe_kernels.experiments.baselines import most_popular
from maskmoe_kernels.experiments.data.movielens import (
    MovieLens,
    Split,
    draw_negatives,
    leave_one_out,
    read_fixed_negatives,
    read_movielens,
    sample_training_pairs,
)
from maskmoe_kernels.experiments.metrics import hit_rate, leave_one_out_ranks, ndcg
from maskmoe_kernels.experiments.report import machine, write_json
from maskmoe_kernels.experiments.train import Run, TrainConfig, fit, load_checkpoint
from maskmoe_kernels.models import NCF, InterpretableNCF, NCFSizes
from maskmoe_kernels.objectives import gem_loss, mixture

MODELS = ("content", "black-box", "interpretable")
#: Table 1 of the paper: HR@10 and NDCG@10.
PAPER = {
    "content": (0.386, 0.218),
    "black-box": (0.715, 0.438),
    "interpretable": (0.678, 0.406),
}
#: Powers tried for the smaller experts' confidence.
SHARPNESS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0)
#: The authors' confidence for rare positives, in training and in prediction.
CONFIDENCE = "rare"


@dataclass(frozen=True)
class Options:
    """Settings of one run; see ``maskmoe movielens --help``."""

    models: Sequence[str] = MODELS
    epochs: int = 20
    patience: int = 5
    batch_size: int = 256
    seed: int = 0
    embeddings: str = "shared"
    device: str = "cpu"
    resume: bool = False
    sharpness: float | None = None  # None: chosen on validation items
    max_loss: float = 0.01


class Task:
    """The data on a device: features, split, and the lists to rank.

    Attributes:
        data: The tables.
        split: Leave-one-out split.
        validation_lists: Validation item, then 99 drawn negatives, ``(U, 100)`` int64.
        test_lists: Test item, then its negatives, ``(U, 100)`` int64.
    """

    def __init__(
        self, data: MovieLens, seed: int, negatives: Path | None, device: str = "cpu"
    ) -> None:
        self.data = data
        self.device = torch.device(device)
        self.split: Split = leave_one_out(data, seed)
        self.fixed_negatives = negatives is not None
        drawn = draw_negatives(data, self.split, seed)
        test = (
            draw_negatives(data, self.split, seed + 1)
            if negatives is None
            else read_fixed_negatives(negatives, data, self.split)
        )
        self.validation_lists = torch.cat([self.split.validation[:, None], drawn], 1)
        self.test_lists = torch.cat([self.split.test[:, None], test], 1)
        self.codes = torch.stack([data.sex, data.age, data.occupation], 1).to(self.device)
        year = data.year.double()
        rated = year[data.rated_items]
        standard = ((year - rated.mean()) / rated.std()).float()
        self.numeric = torch.cat([standard[:, None], data.genres], 1).to(self.device)

    @property
    def sizes(self) -> NCFSizes:
        """Sizes of the models for this data."""
        return NCFSizes(
            self.data.num_users, self.data.num_items, num_numeric=self.numeric.shape[1]
        )

    def logits(self, model: nn.Module, users: Tensor, items: Tensor) -> Tensor:
        """Logits of user and item rows of equal shape, ``(*, H)``."""
        out: Tensor = model(users, items, self.codes[users], self.numeric[items])
        return out

    @torch.inference_mode()
    def list_logits(self, model: nn.Module, lists: Tensor, chunk: int = 256) -> Tensor:
        """Logits of ranking lists ``(U, K)``: ``(U, K, H)`` on the CPU."""
        parts = []
        for start in range(0, len(lists), chunk):
            items = lists[start : start + chunk].to(self.device)
            users = torch.arange(start, start + len(items), device=self.device)
            parts.append(self.logits(model, users[:, None].expand_as(items), items).cpu())
        return torch.cat(parts)

    def ranking(self, scores: Tensor, lists: Tensor) -> dict[str, float]:
        """HR@10 and NDCG@10 of scores ``(U, K)``, the positive first."""
        # Some published lists hold the positive among its own negatives.
        same = lists[:, 1:] == lists[:, :1]
        ranks = leave_one_out_ranks(scores[:, 0], scores[:, 1:], same)
        return {"HR@10": hit_rate(ranks), "NDCG@10": ndcg(ranks)}

    def epoch(self, seed: int, number: int) -> tuple[Tensor, ...]:
        """Users, items and targets of epoch ``number``: 4 fresh negatives per positive."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        samples = sample_training_pairs(
            self.split,
            self.split.interacted_train,
            self.data.rated_items,
            generator=generator,
        )
        return tuple(part.to(self.device) for part in samples)


def build(name: str, sizes: NCFSizes, embeddings: str = "shared") -> NCF | InterpretableNCF:
    """One of ``MODELS``, freshly initialised."""
    if name == "interpretable":
        return InterpretableNCF(sizes, embeddings=embeddings)
    return NCF(sizes, personal=name == "black-box")


def scores(model: nn.Module, logits: Tensor, sharpness: float = 1.0) -> Tensor:
    """What a model ranks by, ``(*,)`` float64: probability of the mixture, or the one logit."""
    if isinstance(model, InterpretableNCF):
        return mixture(logits.double(), model.family, CONFIDENCE, sharpness).probability
    return logits[..., 0].double()


def run_movielens(
    path: Path, out: Path, options: Options, negatives: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train what is asked for, evaluate, write ``report.json`` and the figures into ``out``.

    Raises:
        DataError: Damaged data, or a checkpoint of another configuration.
    """
    task = Task(read_movielens(path), options.seed, negatives, options.device)
    popular = most_popular(task.split, task.data.num_items)[task.test_lists]
    report: dict[str, Any] = {
        "experiment": "MovieLens-1M, leave one out, 1 positive among 99 negatives",
        "machine": machine(),
        "options": {**vars(options), "models": list(options.models)},
        "fixed_negatives": task.fixed_negatives,
        "most_popular": task.ranking(popular, task.test_lists),
        "models": {},
    }
    if console is not None:
        check = report["most_popular"]
        console.print(
            f"most popular: HR@10 {check['HR@10']:.3f}  NDCG@10 {check['NDCG@10']:.3f}"
            + ("  (known: 0.453, 0.254 with these negatives)" if task.fixed_negatives else "")
        )
    for name in options.models:
        model, run = train(name, task, out, options, console)
        report["models"][name] = _evaluate(name, model, run, task, options)
        write_json(out / "report.json", report)
    draw(report, out)
    if console is not None:
        print_report(report, console)
    return report


def train(
    name: str, task: Task, out: Path, options: Options, console: Console | None = None
) -> tuple[nn.Module, Run]:
    """Train one of ``MODELS``, or load what ``options.resume`` finds finished."""
    torch.manual_seed(options.seed)
    model = build(name, task.sizes, options.embeddings).to(task.device)
    family = model.family if isinstance(model, InterpretableNCF) else None

    def loss_of(users: Tensor, items: Tensor, target: Tensor) -> Tensor:
        logits = task.logits(model, users, items)
        if family is None:
            return F.binary_cross_entropy_with_logits(logits[:, 0], target)
        return gem_loss(
            logits, target, family, CONFIDENCE, weighting="deselection", normalize="expert"
        )

    def validate() -> dict[str, float]:
        logits = task.list_logits(model, task.validation_lists)
        return task.ranking(scores(model, logits), task.validation_lists)

    config = TrainConfig(
        model=name,
        epochs=options.epochs,
        patience=options.patience,
        batch_size=options.batch_size,
        seed=options.seed,
        options=f"embeddings={options.embeddings}" if name == "interpretable" else "",
    )
    run = fit(
        model,
        lambda epoch: task.epoch(options.seed, epoch),
        loss_of,
        validate,
        config,
        out / f"{name}.pt",
        resume=options.resume,
        console=console,
    )
    return model, run


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
    largest = model.family.membership.sum(1).argmax()
    result |= {
        "frontier": points,
        "sharpness": chosen,
        "chosen": "given" if options.sharpness is not None else f"max loss {options.max_loss}",
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
    # Metrics peak at different points: with a tight max_loss none may satisfy both.
    return min(good) if good else float(max(points, key=lambda p: p["validation"]["NDCG@10"])["sharpness"])


def draw(report: Mapping[str, Any], out: Path) -> None:
    """All figures of a report."""
    figures.learning_curves(
        {name: model["history"] for name, model in report["models"].items()},
        out / "learning_curves.png",
    )


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
    table = Table(title="The mixing rule's frontier: what explanation by small experts costs")
    for column in ("sharpness", "HR@10", "NDCG@10", *(f"decided by {n}" for n in names)):
        table.add_column(column, justify="right")
    for point in interpretable["frontier"]:
        mark = " *" if point["sharpness"] == interpretable["sharpness"] else ""
        table.add_row(
            f"{point['sharpness']:g}{mark}",
            f"{point['test']['HR@10']:.3f}",
            f"{point['test']['NDCG@10']:.3f}",
            *(f"{point['decided'][n]:.2f}" for n in names),
        )
    console.print(table)
