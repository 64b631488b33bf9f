"""Evaluation of the MovieLens models: ranking metrics, who decides, and at what sharpness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from maskmoe_kernels.experiments.movielens.data.ranking import Task
from maskmoe_kernels.experiments.movielens.sufficient import answers, print_sufficient
from maskmoe_kernels.experiments.shared.output import Column, print_table
from maskmoe_kernels.experiments.shared.report import sealed
from maskmoe_kernels.models import InterpretableNCF
from maskmoe_kernels.ops.selection import mixture

#: Powers tried for the smaller experts' confidence.
SHARPNESS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0)
#: The authors' confidence for rare positives, in training and in prediction.
CONFIDENCE = "rare"
#: Keys of the report's interpretable model that ``explain`` reads, and their checksum.
SEALED = ("sharpness", "chosen", "checksum")


def scores(
    model: nn.Module, logits: Tensor, sharpness: float = 1.0, *, mixes: bool = True
) -> Tensor:
    """What a model ranks by, ``(*,)`` float64: probability of the mixture, or the one logit.

    Without ``mixes``, experts are not mixed: it is the logit of the one that sees all.
    """
    if isinstance(model, InterpretableNCF) and not mixes:
        return answers(model, logits)
    if isinstance(model, InterpretableNCF):
        return mixture(logits.double(), model.family, CONFIDENCE, sharpness).probability
    return logits[..., 0].double()


def evaluate(
    model: nn.Module, task: Task, sharpness: float | None, max_loss: float
) -> dict[str, Any]:
    """Ranking metrics on the test lists; of the interpretable model also who decides.

    Args:
        model: Trained.
        task: The lists to rank.
        sharpness: Of the smaller experts' confidence; ``None``: chosen on validation items.
        max_loss: See :func:`choose_sharpness`.

    Returns:
        A part of the report, ready for json.
    """
    test = task.list_logits(model, task.test_lists)
    if not isinstance(model, InterpretableNCF):
        return {"test": task.ranking(scores(model, test), task.test_lists)}
    held = task.list_logits(model, task.validation_lists)
    points = [_frontier_point(model, task, held, test, power) for power in SHARPNESS]
    chosen = choose_sharpness(points, max_loss) if sharpness is None else sharpness
    if chosen not in SHARPNESS:
        points.append(_frontier_point(model, task, held, test, chosen))
        points.sort(key=lambda p: p["sharpness"])
    point = next(p for p in points if p["sharpness"] == chosen)
    how = "given" if sharpness is not None else f"max loss {max_loss}"
    largest = model.family.membership.sum(1).argmax()
    return {
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


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """The table beside the paper's table 1, and the frontier."""
    columns = [
        Column("model", text=True),
        Column("parameters", optional=1),
        Column("HR@10"),
        Column("NDCG@10"),
        Column("paper HR@10", optional=2),
        Column("paper NDCG@10", optional=2),
    ]
    rows = []
    for name, model in report["models"].items():
        cells = [model["test"]["HR@10"], model["test"]["NDCG@10"], *model["paper"].values()]
        shown = [f"{value:.3f}" for value in cells] + ["-"] * (4 - len(cells))
        rows.append([name, f"{model['parameters']:,}", *shown])
    print_table(console, "MovieLens-1M (test)", columns, rows)
    interpretable = report["models"].get("interpretable")
    if interpretable is not None:
        _print_frontier(interpretable, console)
    if "sufficient" in report["models"]:
        print_sufficient(report["models"]["sufficient"], console)


def _print_frontier(interpretable: Mapping[str, Any], console: Console) -> None:
    names = list(interpretable["mean_attribution"])
    columns = [Column("sharpness"), Column("HR@10"), Column("NDCG@10")]
    if console.is_terminal:
        columns += [Column(name, optional=1) for name in names]
        about = "Experts: share of test items decided / mean attribution. "
    else:  # one value a cell
        columns += [Column(f"{name} {what}") for name in names for what in ("decided", "mean")]
        about = "decided: share of test items that the expert decides; mean: its mean attribution. "
    rows = []
    for point in interpretable["frontier"]:
        pairs = [(point["decided"][n], point["mean_attribution"][n]) for n in names]
        experts = [f"{decided:.2f}/{mean:.2f}" for decided, mean in pairs]
        if not console.is_terminal:
            experts = [f"{value:.2f}" for pair in pairs for value in pair]
        mark = " *" if point["sharpness"] == interpretable["sharpness"] else ""
        metrics = [f"{value:.3f}" for value in point["test"].values()]
        rows.append([f"{point['sharpness']:g}{mark}", *metrics, *experts])
    alone = interpretable["largest_expert_alone"]
    print_table(
        console,
        "Interpretable: metrics (test), and what each expert holds, over sharpness",
        columns,
        rows,
        f"{about}* {interpretable['chosen']}. The largest expert alone: HR@10 "
        f"{alone['HR@10']:.3f}, NDCG@10 {alone['NDCG@10']:.3f}.",
    )
