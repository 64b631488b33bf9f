"""Fixed test negatives, as the authors of Neural Collaborative Filtering publish them.

A line is ``(user,positive)``, then the user's negatives, tab-separated. The numbers are MovieLens
ids, or, as in the authors' own ``ml-1m.test.negative``, they count users and movies from 0 in the
order in which ``ratings.dat`` names them first.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from maskmoe_kernels.experiments.movielens.data.files import DataFile, read_packed
from maskmoe_kernels.experiments.movielens.data.split import Split
from maskmoe_kernels.experiments.movielens.data.tables import (
    MovieLens,
    first_repeat,
    first_true,
    look_up,
)

_PAIR = re.compile(r"\((\d{1,18}),(\d{1,18})\)", re.ASCII)


def read_fixed_negatives(
    path: str | Path, data: MovieLens, split: Split, per_user: int = 99
) -> Tensor:
    """Read published test negatives, ``per_user`` a line, in either numbering.

    The published file lists some users' positive among their own negatives; it is returned as it
    stands, and ``negatives == split.test[:, None]`` finds it.

    Args:
        path: A text file, plain or compressed by gzip, bzip2, xz or zip.
    Returns:
        Movie rows, row u for user u, ``(U, per_user)`` int64.
    Raises:
        DataError: The file is missing or damaged, a user is unknown, absent or repeated, a movie
            is unknown, or a positive is not the split's test item.
    """
    file = read_packed(Path(path))
    pairs, negatives = _parse(file, per_user)
    numbering = _numbering_of(pairs, data, split)
    users = _users(file, pairs, numbering, data, split)
    items, known = look_up(numbering.movies, negatives.flatten())
    if (row := first_true(~known)) is not None:
        bad = int(negatives.flatten()[row])
        expected = f"movies of {numbering.movie_source}"
        raise file.error(row // per_user + 1, expected, bad, numbering.remedy)
    result = torch.empty(data.num_users, per_user, dtype=torch.int64)
    result[users] = items.view(-1, per_user)
    return result


@dataclass(frozen=True, eq=False)
class _Numbering:
    """The numbers by which a file names users and movies.

    Attributes:
        users: Number of each user, ``(U,)`` int64.
        movies: Number of each movie, ``(I,)`` int64; -1: it has none.
        user_source: Where the numbers of users come from, for messages.
        movie_source: Where those of movies come from.
        remedy: What to do where the numbers do not fit.
    """

    users: Tensor
    movies: Tensor
    user_source: str
    movie_source: str
    remedy: str

    def agreement(self, pairs: Tensor, split: Split) -> int:
        """How many of the lines name the test item of a user."""
        users, known = look_up(self.users, pairs[:, 0])
        return int((known & (self.movies[split.test[users]] == pairs[:, 1])).sum())


def _numbering_of(pairs: Tensor, data: MovieLens, split: Split) -> _Numbering:
    """The numbering of a file, by the test items that it names.

    Args:
        pairs: Number of the user and of the positive of each line, ``(L, 2)`` int64.
    """
    official = _Numbering(
        data.user_ids,
        data.movie_ids,
        "users.dat",
        "movies.dat",
        "The negatives must belong to this data set and this split.",
    )
    counted = _Numbering(
        _by_appearance(data.users, data.num_users),
        _by_appearance(data.items, data.num_items),
        "ratings.dat, counted from 0",
        "ratings.dat, counted from 0",
        "The numbers count users and movies as ratings.dat names them first, so it must be the "
        "official file with its lines in their order.",
    )
    ours, theirs = official.agreement(pairs, split), counted.agreement(pairs, split)
    if 2 * max(ours, theirs) <= len(pairs):  # neither fits: the official ids start at 1
        return counted if bool((pairs[:, 0] == 0).any()) else official
    return counted if theirs > ours else official


def _by_appearance(rows: Tensor, count: int) -> Tensor:
    """Number of each row 0..count - 1 in the order of first appearance in ``rows``; -1: never."""
    first = torch.full((count,), len(rows))
    first.scatter_reduce_(0, rows, torch.arange(len(rows)), "amin")
    numbers = first.argsort().argsort()
    return numbers.where(first < len(rows), -1)


def _parse(file: DataFile, per_user: int) -> tuple[Tensor, Tensor]:
    """(user, positive) ``(L, 2)`` and negatives ``(L, per_user)``, line by line."""
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


def _users(
    file: DataFile, pairs: Tensor, numbering: _Numbering, data: MovieLens, split: Split
) -> Tensor:
    """User row of each line, ``(U,)``; raises unless every user has one line and its test item."""
    users, known = look_up(numbering.users, pairs[:, 0])
    if (row := first_true(~known)) is not None:
        expected = f"a user of {numbering.user_source}"
        raise file.error(row + 1, expected, int(pairs[row, 0]), numbering.remedy)
    if repeat := first_repeat(users):
        first, row = repeat
        got = f"user {int(pairs[row, 0])} of line {first + 1} again"
        raise file.error(row + 1, "each user once", got, "Remove one of the two lines.")
    absent = torch.ones(data.num_users, dtype=torch.bool)
    absent[users] = False
    if (row := first_true(absent)) is not None:
        got = f"none for user {int(numbering.users[row])}"
        expected = f"one line for each of {data.num_users} users"
        remedy = "The file is cut short, or belongs to another data set. Fetch it again."
        raise file.error(None, expected, got, remedy)
    positive = numbering.movies[split.test[users]]
    if (row := first_true(pairs[:, 1] != positive)) is not None:
        user, got = pairs[row].tolist()
        expected = f"the test item {int(positive[row])} of user {user}"
        if numbering.movies is not data.movie_ids:
            user_row = int(users[row])
            user, item = int(data.user_ids[user_row]), int(data.movie_ids[split.test[user_row]])
            expected += f" (movie {item} of user {user})"
            items, known = look_up(numbering.movies, pairs[row, 1:])
            got = f"{got} (movie {int(data.movie_ids[items[0]])})" if known[0] else got
        raise file.error(row + 1, expected, got, numbering.remedy)
    return users
