"""The smallest expert that suffices: metrics of the expert that sees all, and who could decide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from maskmoe_kernels.experiments.movielens import TOLERANCE
from maskmoe_kernels.experiments.movielens.data.ranking import Task
from maskmoe_kernels.experiments.shared.output import Column, print_table
from maskmoe_kernels.explain import interactions, shapley, sufficient
from maskmoe_kernels.explain.sufficient import top_expert
from maskmoe_kernels.models import InterpretableNCF

#: Log-odds within which a smaller expert may differ from the one that sees all.
TOLERANCES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
#: Movies of a list that a user would see.
_SHOWN = 10
#: Users for whom all movies are ranked, at the most: for each, thousands of pairs.
_USERS = 1000
#: Whose shares a point of the frontier holds, and the word for them in the table.
_OF = {"decided": "decided", "recommended": "shown", "catalogue": "catalogue"}


def answers(model: InterpretableNCF, logits: Tensor) -> Tensor:
    """Logits of the expert that sees all, ``(*,)`` float64: what this model ranks by."""
    return logits[..., top_expert(model.family)].double()


def evaluate_sufficient(model: InterpretableNCF, task: Task) -> dict[str, Any]:
    """Ranking metrics on the test lists, and at each tolerance who suffices.

    Args:
        model: Trained with uniform weights: expert i has learned E[y | x_Si].
        task: The lists to rank.

    Returns:
        A part of the report, ready for json. ``test`` are the metrics of the expert that sees all.
        A point of ``frontier`` has the share of movies for which an expert is the smallest that
        suffices: ``decided`` of the test positives, ``recommended`` of the ten best of each test
        list, ``catalogue`` of the recommendations of :func:`best_of_catalogue`; and ``test``, the
        metrics if each expert answered for its items. ``contributions`` are the mean sizes of
        :class:`Contributions`.
    """
    logits = task.list_logits(model, task.test_lists).double()
    catalogue = best_of_catalogue(model, task)
    added = contributions(model, logits)
    groups = list(model.family.groups)
    return {
        "family": {
            "groups": dict(model.family.groups),
            "subsets": {name: list(of) for name, of in model.family.subsets.items()},
        },
        "tolerance": TOLERANCE,
        "frontier": [_point(model, task, logits, catalogue, t) for t in TOLERANCES],
        "contributions": {
            "mean_size": dict(zip(groups, added.phi.abs().mean(0).tolist(), strict=True)),
            "interactions": added.interactions.abs().mean(0).tolist(),
        },
        "test": task.ranking(answers(model, logits), task.test_lists),
    }


class Contributions(NamedTuple):
    """What groups add to the recommendations, in log-odds.

    Attributes:
        phi: Shapley values of user and item; of content, what it says less its mean over the
            recommendations. ``(n, 3)``, in the order of the family's groups.
        interactions: Whose rows sum to ``phi``, ``(n, 3, 3)``.
        probability: That the user watches the movie, ``(n,)``.
    """

    phi: Tensor
    interactions: Tensor
    probability: Tensor


def contributions(model: InterpretableNCF, logits: Tensor) -> Contributions:
    """Of the ten movies of each list that a user would see; logits ``(U, K, 4)``, float64."""
    best = _recommended(model, logits)
    shown = logits.gather(1, best[..., None].expand(-1, -1, logits.shape[-1])).flatten(0, 1)
    family = model.family
    phi, between = 2 * shapley(shown, family), 2 * interactions(shown, family)
    content = 2 * shown[:, family.names.index("content")]
    at = list(family.groups).index("content")
    phi[:, at] = between[:, at, at] = content - content.mean()
    return Contributions(phi, between, torch.sigmoid(2 * answers(model, shown)))


def _recommended(model: InterpretableNCF, logits: Tensor) -> Tensor:
    """The ten of each list that a user would see, ``(U, 10)`` int64."""
    return answers(model, logits).topk(min(_SHOWN, logits.shape[1]), dim=1).indices


@torch.inference_mode()
def best_of_catalogue(
    model: InterpretableNCF, task: Task, most: int = _USERS, chunk: int = 16
) -> Tensor:
    """Logits of users' ten best movies that someone rated and the user did not.

    Best is what the expert that sees all says. A user to whom fewer movies are left has fewer.

    Args:
        model: Trained.
        task: Whose movies to rank.
        most: Users at the most, evenly spaced among all.
        chunk: Users at a time.

    Returns:
        One row a recommendation, users in order and best first, ``(n, 4)`` float64 on the CPU.
    """
    movies = task.data.rated_items
    seen = torch.zeros(task.data.num_users, task.data.num_items, dtype=torch.bool)
    seen[task.data.users, task.data.items] = True
    best: list[Tensor] = []
    count = task.data.num_users
    for users in (torch.arange(min(count, most)) * count // min(count, most)).split(chunk):
        pairs = torch.cartesian_prod(users, movies).to(task.device)
        logits = task.logits(model, *pairs.unbind(1)).unflatten(0, (len(users), -1)).cpu().double()
        score = answers(model, logits).masked_fill(seen[users][:, movies], -torch.inf)
        top = score.topk(min(_SHOWN, len(movies)), dim=1)
        at = top.indices[..., None].expand(-1, -1, logits.shape[-1])
        best.append(logits.gather(1, at)[top.values > -torch.inf])
    return torch.cat(best)


def _point(
    model: InterpretableNCF, task: Task, logits: Tensor, catalogue: Tensor, tolerance: float
) -> dict[str, Any]:
    found = sufficient(logits, model.family, tolerance).expert
    best = _recommended(model, logits)
    deciding = logits.gather(-1, found.unsqueeze(-1))[..., 0]
    return {
        "tolerance": tolerance,
        "test": task.ranking(deciding, task.test_lists),
        "decided": _shares(model, found[:, 0]),
        "recommended": _shares(model, found.gather(1, best)),
        "catalogue": _shares(model, sufficient(catalogue, model.family, tolerance).expert),
    }


def _shares(model: InterpretableNCF, experts: Tensor) -> dict[str, float]:
    names = model.family.names
    count = torch.bincount(experts.reshape(-1), minlength=len(names)).double()
    return dict(zip(names, (count / experts.numel()).tolist(), strict=True))


def print_sufficient(found: Mapping[str, Any], console: Console) -> None:
    """The table of who suffices."""
    names = list(found["frontier"][0]["decided"])
    columns = [Column("tolerance"), Column("HR@10"), Column("NDCG@10")]
    columns += [Column(f"{name} {what}") for name in names for what in _OF.values()]
    if console.is_terminal:
        columns[3:] = [Column(name, optional=1) for name in names]
    rows = []
    for point in found["frontier"]:
        shares = [[f"{point[of][name]:.2f}" for of in _OF] for name in names]
        cells = [share for of_expert in shares for share in of_expert]
        if console.is_terminal:
            cells = ["/".join(of_expert) for of_expert in shares]
        mark = " *" if point["tolerance"] == found["tolerance"] else ""
        metrics = [f"{value:.3f}" for value in point["test"].values()]
        rows.append([f"{point['tolerance']:g}{mark}", *metrics, *cells])
    print_table(
        console,
        "Sufficient: metrics of the deciding experts (test), and who suffices, over tolerance",
        columns,
        rows,
        "tolerance: in log-odds. Experts: share of test items (decided), of the ten best of each "
        "list (shown) and of each user's ten best of all movies (catalogue) for which this is the "
        "smallest expert that agrees with the one that sees all. * used in explanations.",
    )
