"""Scorers without a model, to check an evaluation against known numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from maskmoe_kernels.experiments.data.movielens import Split


def most_popular(split: Split, num_items: int) -> Tensor:
    """Number of training pairs of each item, the same score for every user.

    Validation and test items are not counted: a baseline knows what a model in training knows.

    Returns:
        Scores, ``(num_items,)`` float32; exact, for counts stay below 2^24.
    """
    return torch.bincount(split.train_items, minlength=num_items).float()
