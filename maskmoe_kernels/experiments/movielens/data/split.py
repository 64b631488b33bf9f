"""The leave-one-out split of MovieLens-1M."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.movielens.data.tables import MovieLens


@dataclass(frozen=True, eq=False)
class Split:
    """One test and one validation item per user; all other pairs train.

    Attributes:
        train_users: User row of each training pair in file order, ``(P - 2 U,)`` int64.
        train_items: Movie row of each training pair, ``(P - 2 U,)`` int64.
        validation: Movie row of each user's validation item, ``(U,)`` int64.
        test: Movie row of each user's test item, ``(U,)`` int64.
        num_items: ``I``.
    """

    train_users: Tensor
    train_items: Tensor
    validation: Tensor
    test: Tensor
    num_items: int

    @cached_property
    def interacted_train(self) -> Tensor:
        """Is (user, item) a training pair? ``(U, I)`` bool: what training negatives avoid."""
        matrix = torch.zeros(len(self.test), self.num_items, dtype=torch.bool)
        matrix[self.train_users, self.train_items] = True
        return matrix

    @cached_property
    def interacted(self) -> Tensor:
        """Did the user ever rate the item? ``(U, I)`` bool: what test negatives avoid."""
        matrix = self.interacted_train.clone()
        rows = torch.arange(len(self.test))
        matrix[rows, self.validation] = True
        matrix[rows, self.test] = True
        return matrix


def leave_one_out(data: MovieLens, seed: int) -> Split:
    """Hold out each user's last item for test and one random other item for validation.

    The last item has the latest timestamp; of several, the one furthest down the file.

    Raises:
        DataError: A user has fewer than 3 ratings, so nothing would be left to train on.
    """
    count = torch.bincount(data.users, minlength=data.num_users)
    if (poor := (count < 3).nonzero()).numel():
        user = int(poor[0])
        raise DataError(
            f"user {int(data.user_ids[user])} has {int(count[user])} ratings in ratings.dat; "
            "leave-one-out needs at least 3 (test, validation, train). Remove such users."
        )
    # Two stable sorts: by user, within a user by time, within a time by place in the file.
    order = data.timestamps.sort(stable=True).indices
    order = order[data.users[order].sort(stable=True).indices]
    end = count.cumsum(0)
    test = order[end - 1]
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(data.num_users, generator=generator, dtype=torch.float64)
    validation = order[end - count + (uniform * (count - 1)).long()]
    train = torch.ones(len(data.users), dtype=torch.bool)
    train[test] = False
    train[validation] = False
    return Split(
        train_users=data.users[train],
        train_items=data.items[train],
        validation=data.items[validation],
        test=data.items[test],
        num_items=data.num_items,
    )
