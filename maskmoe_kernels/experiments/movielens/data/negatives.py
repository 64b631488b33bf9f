"""Negatives that are drawn: once for evaluation, fresh ones for each epoch of training."""

from __future__ import annotations

import torch
from torch import Tensor

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.movielens.data.split import Split
from maskmoe_kernels.experiments.movielens.data.tables import MovieLens, first_true


def draw_negatives(data: MovieLens, split: Split, seed: int, per_user: int = 99) -> Tensor:
    """Draw test negatives: distinct per user, uniform over rated movies the user never rated.

    Returns:
        Movie rows, ``(U, per_user)`` int64.
    Raises:
        DataError: A user has rated so much that fewer than ``per_user`` movies are left.
    """
    candidates = data.rated_items
    taken = split.interacted[:, candidates]
    left = len(candidates) - taken.sum(1)
    if (short := (left < per_user).nonzero()).numel():
        user = int(short[0])
        raise DataError(
            f"user {int(data.user_ids[user])} leaves {int(left[user])} rated movies to draw from; "
            f"{per_user} negatives per user were asked. Ask for fewer."
        )
    # The largest of independent uniform keys are a uniform draw without replacement.
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(taken.shape, generator=generator).masked_fill_(taken, -1.0)
    return candidates[keys.topk(per_user, dim=1).indices]


def sample_training_pairs(
    split: Split,
    interacted_train: Tensor,
    candidates: Tensor,
    ratio: int = 4,
    *,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """One shuffled epoch: every training pair, and ``ratio`` fresh negatives for each.

    As in Neural Collaborative Filtering, negatives are uniform over the candidates the user has
    not in training: a held-out item can be one, for training must not know what is held out.

    Args:
        interacted_train: ``split.interacted_train``, ``(U, I)`` bool.
        candidates: Movie rows to draw from, such as ``data.rated_items``, ``(C,)`` int64.
        generator: Its state moves on, so each call is a new epoch.
    Returns:
        Users and items, ``(P' (1 + ratio),)`` int64, and the target 0 or 1, float32.
    Raises:
        ValueError: ``ratio`` is negative, or a training user has every candidate in training.
    """
    if ratio < 0:
        raise ValueError(f"ratio must be at least 0, got {ratio}")
    has_choice = (~interacted_train[:, candidates]).any(1)
    if ratio and (row := first_true(~has_choice[split.train_users])) is not None:
        raise ValueError(
            f"user row {int(split.train_users[row])} has all {len(candidates)} candidates in "
            "training, so no negative exists. Pass more candidates or drop the user."
        )
    users = torch.cat([split.train_users, split.train_users.repeat_interleave(ratio)])
    positives = len(split.train_users)
    negatives = _draw_outside(interacted_train, candidates, users[positives:], generator)
    items = torch.cat([split.train_items, negatives])
    order = torch.randperm(len(users), generator=generator)
    # index_select takes half the time of users[order], and an epoch has 5 million of them.
    users, items = users.index_select(0, order), items.index_select(0, order)
    return users, items, (order < positives).float()


def _draw_outside(
    taken: Tensor, candidates: Tensor, users: Tensor, generator: torch.Generator
) -> Tensor:
    """One candidate per entry of ``users``, uniform over those not ``taken[user]``."""
    items = torch.empty_like(users)
    flat = taken.reshape(-1)
    pending = torch.arange(len(users))
    # Rejection: on real data 1 draw in 10 falls on a training item, so few rounds are needed.
    while len(pending):
        choice = torch.randint(len(candidates), pending.shape, generator=generator)
        drawn = candidates.index_select(0, choice)
        items[pending] = drawn
        cell = users.index_select(0, pending) * taken.shape[1] + drawn
        pending = pending[flat.index_select(0, cell)]
    return items
