"""A scorer without a model, to check an evaluation against known numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from maskmoe_kernels.experiments.movielens.data.split import Split


def most_popular(split: Split, num_items: int) -> Tensor:
    """Number of known pairs of each item, the same score for every user.

    All pairs but the test items count, validation items too: nothing is chosen here that would
    need them, and the figures known for a published split count them.

    Returns:
        Scores, ``(num_items,)`` float32; exact, for counts stay below 2^24.
    """
    known = torch.cat([split.train_items, split.validation])
    return torch.bincount(known, minlength=num_items).float()
