"""MovieLens-1M as tables.

The data set is described in Harper and Konstan (2015), "The MovieLens Datasets: History and
Context". It may not be redistributed, so a user brings the official ``ml-1m.zip``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

SEXES = ("F", "M")
AGES = (1, 18, 25, 35, 45, 50, 56)
NUM_OCCUPATIONS = 21
# The order of the official README.
GENRES = (
    "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
    "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller",
    "War", "Western",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class MovieLens:
    """Users, movies and their pairs; every index counts rows of ``users.dat``, ``movies.dat``.

    Attributes:
        user_ids: Official user ids in file order, ``(U,)`` int64.
        movie_ids: Official movie ids in file order, never-rated movies too, ``(I,)`` int64.
        sex: Index into ``SEXES``, ``(U,)`` int64.
        age: Index into ``AGES``, ``(U,)`` int64.
        occupation: Official code 0..20, ``(U,)`` int64.
        titles: Titles as in the file, year suffix included, ``I`` of them.
        year: Year of the title's suffix, ``(I,)`` int64.
        genres: One flag per name in ``GENRES``, ``(I, 18)`` float32.
        users: User row of each rating in file order, ``(P,)`` int64.
        items: Movie row of each rating, ``(P,)`` int64.
        timestamps: Seconds since 1970 of each rating, ``(P,)`` int64.
    """

    user_ids: Tensor
    movie_ids: Tensor
    sex: Tensor
    age: Tensor
    occupation: Tensor
    titles: list[str]
    year: Tensor
    genres: Tensor
    users: Tensor
    items: Tensor
    timestamps: Tensor

    @property
    def num_users(self) -> int:
        """``U``."""
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """``I``, never-rated movies included."""
        return len(self.movie_ids)

    @cached_property
    def rated_items(self) -> Tensor:
        """Rows of the movies that someone rated, ascending, ``(C,)`` int64."""
        rated: Tensor = torch.unique(self.items)
        return rated


def look_up(ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Row of each value in ``ids``, and whether it is there; rows of the others mean nothing."""
    ordered, rows = ids.sort()
    place = torch.searchsorted(ordered, values.contiguous()).clamp_(max=len(ids) - 1)
    return rows[place], ordered[place] == values


def first_true(flags: Tensor) -> int | None:
    """Index of the first true flag of a ``(P,)`` tensor; None where all are false."""
    return int(flags.int().argmax()) if bool(flags.any()) else None


def first_repeat(keys: Tensor) -> tuple[int, int] | None:
    """The first index whose key came before, after the index where it first came."""
    ordered, order = keys.sort(stable=True)
    later = order[1:][ordered[1:] == ordered[:-1]]
    if not len(later):
        return None
    row = int(later.min())
    return int((keys == keys[row]).nonzero()[0]), row
