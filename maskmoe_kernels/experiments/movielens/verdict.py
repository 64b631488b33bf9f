"""Who decides on a movie, by the paper's mixture or as the smallest expert that suffices."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from maskmoe_kernels.experiments.movielens.evaluate import CONFIDENCE
from maskmoe_kernels.explain import shapley, sufficient
from maskmoe_kernels.models import InterpretableNCF
from maskmoe_kernels.ops.selection import mixture


class Verdict(NamedTuple):
    """On some movies.

    Attributes:
        probability: That the user watches each, ``(n,)``.
        expert: Who decides, ``(n,)`` int64.
        share: Of each expert in the decision, ``(n, 4)``; ``None`` where experts have none.
        gap: From the expert that sees all, in log-odds, ``(n,)``; ``None`` in a mixture.
        contributions: Group to what it adds to the log-odds, ``(n,)``; content is the base.
    """

    probability: Tensor
    expert: Tensor
    share: Tensor | None
    gap: Tensor | None
    contributions: dict[str, Tensor]

    def at(self, k: int) -> Verdict:
        """On movie ``k`` alone, without the axis of movies."""
        return Verdict(
            self.probability[k],
            self.expert[k],
            None if self.share is None else self.share[k],
            None if self.gap is None else self.gap[k],
            {group: value[k] for group, value in self.contributions.items()},
        )


#: From a model and the logits of its experts.
Decide = Callable[[InterpretableNCF, Tensor], Verdict]


def mixed(model: InterpretableNCF, logits: Tensor, sharpness: float) -> Verdict:
    """By the mixture: the expert with the largest share."""
    found = mixture(logits, model.family, CONFIDENCE, sharpness)
    share = found.attribution
    return Verdict(found.probability, share.argmax(-1), share, None, {})


def sufficing(model: InterpretableNCF, logits: Tensor, tolerance: float) -> Verdict:
    """The smallest expert that suffices, and exact Shapley values of user and item.

    Content lies inside every other expert: it is the base of the game.
    """
    family = model.family
    found = sufficient(logits, family, tolerance)
    added = 2 * shapley(logits, family)
    phi = dict(zip(family.groups, added.unbind(-1), strict=True))
    phi["content"] = 2 * logits[..., family.names.index("content")]
    return Verdict(found.prediction, found.expert, None, found.gap, phi)


def named_values(model: InterpretableNCF, of_experts: Tensor | None) -> dict[str, float]:
    """One value for each expert, ``(4,)``, by name; none where there are none."""
    if of_experts is None:
        return {}
    return dict(zip(model.family.names, of_experts.tolist(), strict=True))
