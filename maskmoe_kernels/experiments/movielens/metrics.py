"""Metrics of the leave-one-out protocol: ranks of one positive among sampled negatives.

Ranks count from 1, the best.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def leave_one_out_ranks(
    positive_score: Tensor, negative_scores: Tensor, ignored: Tensor | None = None
) -> Tensor:
    """Rank of each user's positive among its negatives: 1 + those scored as high or higher.

    A tie counts against the positive: a model that cannot tell the two apart has not ranked it
    first. A constant scorer therefore ranks every positive last, and any other tie rule could
    only give better numbers.

    Args:
        positive_score: ``(U,)``.
        negative_scores: ``(U, N)``.
        ignored: Negatives that do not count, ``(U, N)`` bool; for lists that hold the positive.
    Returns:
        Ranks 1..N + 1, ``(U,)`` float64.
    Raises:
        ValueError: Shapes do not agree, or a score is NaN (it would compare as a loser).
    """
    users, count = len(positive_score), negative_scores.shape[-1]
    if positive_score.shape != (users,) or negative_scores.shape != (users, count):
        raise ValueError(
            f"expected positive_score (U,) and negative_scores (U, N), got "
            f"{tuple(positive_score.shape)} and {tuple(negative_scores.shape)}"
        )
    for name, scores in (("positive_score", positive_score), ("negative_scores", negative_scores)):
        if bool(scores.isnan().any()):
            user = int(scores.isnan().nonzero()[0, 0])
            raise ValueError(f"{name} is NaN for user row {user}; a NaN has no rank")
    ahead = negative_scores >= positive_score[:, None]
    if ignored is not None:
        if ignored.shape != ahead.shape or ignored.dtype != torch.bool:
            raise ValueError(
                f"expected ignored {tuple(ahead.shape)} bool, "
                f"got {tuple(ignored.shape)} {ignored.dtype}"
            )
        ahead = ahead & ~ignored
    return 1.0 + ahead.sum(1, dtype=torch.float64)


def hit_rate(ranks: Tensor, k: int = 10) -> float:
    """Share of users whose positive is among the first ``k``: HR@k = mean[rank <= k].

    Args:
        ranks: From 1, ``(U,)``.
    Raises:
        ValueError: ``ranks`` is empty or holds a NaN or a value below 1, or ``k`` is below 1.
    """
    _check(ranks, k)
    return float((ranks <= k).double().mean())


def ndcg(ranks: Tensor, k: int = 10) -> float:
    """Discounted gain: NDCG@k = mean of 1 / log2(rank + 1) where rank <= k, else 0.

    With one positive the ideal gain is 1, so this is normalised as it stands.

    Args:
        ranks: From 1, ``(U,)``.
    Raises:
        ValueError: ``ranks`` is empty or holds a NaN or a value below 1, or ``k`` is below 1.
    """
    _check(ranks, k)
    ranks = ranks.double()
    gain = math.log(2) / torch.log1p(ranks)
    return float(torch.where(ranks <= k, gain, 0.0).mean())


def _check(ranks: Tensor, k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if ranks.ndim != 1 or not len(ranks):
        raise ValueError(f"expected ranks (U,) of at least one user, got {tuple(ranks.shape)}")
    # Written so that a NaN fails it too.
    if not bool((ranks >= 1).all()):
        raise ValueError("ranks count from 1; got a smaller one or NaN")
