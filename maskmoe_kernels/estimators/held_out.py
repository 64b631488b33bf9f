"""What experts lose on held-out rows, and when one loss is clearly smaller than another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


def losses_of(answers: Tensor, target: Tensor, kind: str) -> Tensor:
    """What experts that answer ``(rows, H)`` or ``(rows, H, K)`` lose on each row: ``(rows, H)``.

    The squared error, or the log loss in nats.
    """
    if kind == "multiclass":
        of_each = target[:, None].expand(answers.shape[:2])
        return functional.cross_entropy(answers.movedim(-1, 1), of_each, reduction="none")
    of_each = target.to(answers.dtype)[:, None].expand_as(answers)
    if kind == "regression":
        return (answers - of_each).square()
    return functional.binary_cross_entropy_with_logits(2 * answers, of_each, reduction="none")


def gain_over(
    losses: Sequence[Tensor], others: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """How much smaller losses are than others, and the standard error of that.

    In the mean over the bags; the error is that of the differences row by row.

    Args:
        losses: Of each bag, on each row that it holds out: ``(rows, *)``.
        others: With which they are compared.
        weights: Of these rows, ``(rows,)``; they add up to 1 in each bag.

    Returns:
        Both ``(*)``, float64.
    """
    gains, variances = [], []
    for mine, its, weight in zip(losses, others, weights, strict=True):
        less, share = (its - mine).double(), weight.double()
        mean = share @ less
        gains.append(mean)
        variances.append((share @ (less - mean) ** 2) * (share @ share))
    bags = len(losses)
    return torch.stack(gains).sum(0) / bags, torch.stack(variances).sum(0).sqrt() / bags


@dataclass(frozen=True)
class Look:
    """What an expert of the bags loses on the rows that they hold out.

    Attributes:
        losses: Of each bag, on each of its rows.
        weights: Of these rows; they add up to 1 in each bag.
    """

    losses: Sequence[Tensor]
    weights: Sequence[Tensor]

    def means(self) -> list[float]:
        """Of each bag."""
        pairs = zip(self.losses, self.weights, strict=True)
        return [float(losses @ weight) for losses, weight in pairs]

    def mean(self) -> float:
        """Over the bags."""
        means = self.means()
        return sum(means) / len(means)

    def gain_over(self, other: Look) -> tuple[float, float]:
        """How much smaller the loss is, in the mean over the bags, and its standard error.

        The error is that of the differences row by row.
        """
        gain, error = gain_over(self.losses, other.losses, self.weights)
        return float(gain), float(error)

    def is_clearly_below(self, other: Look, errors: float = 1.0) -> bool:
        """Is the loss smaller by more than so many standard errors of the difference?

        The one-standard-error rule (Breiman et al., *Classification and Regression Trees*, 1984):
        of few rows, the best of many looks is better by chance.
        """
        gain, error = self.gain_over(other)
        return gain > errors * error


class Watch:
    """The looks at one expert while it learns.

    Attributes:
        first: Before any step.
        best: The one of the least loss.
        stale: Looks since then.
    """

    def __init__(self, first: Look) -> None:
        self.first = self.best = first
        self.least, self.stale = first.mean(), 0

    def sees(self, look: Look) -> bool:
        """Is this look the best so far?"""
        loss = look.mean()
        self.stale += 1
        if loss < self.least - 1e-4 * abs(self.least):
            self.least, self.stale, self.best = loss, 0, look
        return self.stale == 0

    @property
    def chosen(self) -> Look:
        """The best look, or the first one if that is not clearly better."""
        return self.best if self.best.is_clearly_below(self.first) else self.first
