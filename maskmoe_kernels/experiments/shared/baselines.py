"""Scorers without a model, to check an evaluation against known numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from maskmoe_kernels.experiments.movielens.data import Split


def most_popular(split: Split, num_items: int) -> Tensor:
    """Number of known pairs of each item, the same score for every user.

    All pairs but the test items count, validation items too: nothing is chosen here that would
    need them, and the figures known for a published split count them.

    Returns:
        Scores, ``(num_items,)`` float32; exact, for counts stay below 2^24.
    """
    known = torch.cat([split.train_items, split.validation])
    return torch.bincount(known, minlength=num_items).float()


def last_skip(skips: Tensor, padding: Tensor) -> Tensor:
    """The last skip of half A, for every track of B the same, ``(B, 1)``.

    Without a track in A it is 0.5: nothing is known.

    Args:
        skips: Of A, 0 or 1, ``(B, T)``.
        padding: Where A has no track, ``(B, T)`` bool.
    """
    real = ~padding
    last = skips.gather(1, real.cumsum(1).argmax(1, keepdim=True))
    return last.where(real.any(1, keepdim=True), 0.5)


def mean_skip(skips: Tensor, padding: Tensor) -> Tensor:
    """The mean skip of half A, for every track of B the same, ``(B, 1)``.

    Without a track in A it is 0.5: nothing is known. Arguments as for :func:`last_skip`.
    """
    real = ~padding
    count = real.sum(1, keepdim=True)
    return (skips.masked_fill(padding, 0).sum(1, keepdim=True) / count).where(count > 0, 0.5)
