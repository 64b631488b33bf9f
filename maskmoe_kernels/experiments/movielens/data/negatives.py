"""Negatives: drawn or published ones for evaluation, fresh ones for each epoch of training."""

from __future__ import annotations

import io
import re
from pathlib import Path

import torch
from torch import Tensor

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.movielens.data.files import DataFile, read_packed
from maskmoe_kernels.experiments.movielens.data.split import Split
from maskmoe_kernels.experiments.movielens.data.tables import (
    MovieLens,
    first_repeat,
    first_true,
    look_up,
)

_FOREIGN = "The negatives must belong to this data set and this split."
_PAIR = re.compile(r"\((\d{1,18}),(\d{1,18})\)", re.ASCII)


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


def read_fixed_negatives(
    path: str | Path, data: MovieLens, split: Split, per_user: int = 99
) -> Tensor:
    """Read published test negatives: ``(user,positive)``, then ``per_user`` ids, tab-separated.

    The ids are MovieLens ids. The published file lists some users' positive among their own
    negatives; it is returned as it stands, and ``negatives == split.test[:, None]`` finds it.

    Args:
        path: A tsv file, gzipped or plain.
    Returns:
        Movie rows, row u for user u, ``(U, per_user)`` int64.
    Raises:
        DataError: The file is missing or damaged, a user is unknown, absent or repeated, a movie
            is unknown, or a positive is not the split's test item.
    """
    file = read_packed(Path(path))
    pairs, negatives = _parse_negatives(file, per_user)
    users = _users_of_negatives(file, pairs, data, split)
    items, known = look_up(data.movie_ids, negatives.flatten())
    if (row := first_true(~known)) is not None:
        bad = int(negatives.flatten()[row])
        raise file.error(row // per_user + 1, "movies of movies.dat", bad, _FOREIGN)
    result = torch.empty(data.num_users, per_user, dtype=torch.int64)
    result[users] = items.view(-1, per_user)
    return result


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


def _parse_negatives(file: DataFile, per_user: int) -> tuple[Tensor, Tensor]:
    """(user, positive) ids ``(L, 2)`` and negative ids ``(L, per_user)``, line by line."""
    remedy = "Correct the line or fetch the file again."
    pairs: list[tuple[int, int]] = []
    negatives: list[list[int]] = []
    for line, data in enumerate(io.BytesIO(file.text()), start=1):
        head, *rest = data[:-1].decode("latin-1").split("\t")
        if not (match := _PAIR.fullmatch(head)):
            raise file.error(line, "'(user,positive)' and a tab first", repr(head[:40]), remedy)
        if len(rest) != per_user:
            raise file.error(line, f"{per_user} tab-separated negatives", len(rest), remedy)
        pairs.append((int(match[1]), int(match[2])))
        negatives.append([file.integer(line, "negatives", entry) for entry in rest])
    return torch.tensor(pairs), torch.tensor(negatives)


def _users_of_negatives(file: DataFile, pairs: Tensor, data: MovieLens, split: Split) -> Tensor:
    """User row of each line, ``(U,)``; raises unless every user has one line and its test item."""
    users, known = look_up(data.user_ids, pairs[:, 0])
    if (row := first_true(~known)) is not None:
        raise file.error(row + 1, "a user of users.dat", int(pairs[row, 0]), _FOREIGN)
    if repeat := first_repeat(users):
        first, row = repeat
        user = int(pairs[row, 0])
        raise file.error(row + 1, "each user once", f"user {user} of line {first + 1} again")
    absent = torch.ones(data.num_users, dtype=torch.bool)
    absent[users] = False
    if (row := first_true(absent)) is not None:
        got = f"none for user {int(data.user_ids[row])}"
        raise file.error(None, f"one line for each of {data.num_users} users", got, _FOREIGN)
    positive = data.movie_ids[split.test[users]]
    if (row := first_true(pairs[:, 1] != positive)) is not None:
        expected = f"the test item {int(positive[row])} of user {int(pairs[row, 0])}"
        raise file.error(row + 1, expected, int(pairs[row, 1]), _FOREIGN)
    return users
