"""A strict reader of MovieLens-1M."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.movielens.data.files import DataFile, read_container
from maskmoe_kernels.experiments.movielens.data.tables import (
    AGES,
    GENRES,
    NUM_OCCUPATIONS,
    SEXES,
    MovieLens,
    first_repeat,
    first_true,
    look_up,
)

_COLUMNS = {
    "users.dat": ("UserID", "Gender", "Age", "Occupation", "Zip-code"),
    "movies.dat": ("MovieID", "Title", "Genres"),
    "ratings.dat": ("UserID", "MovieID", "Rating", "Timestamp"),
}
_YEAR = re.compile(r"\((\d{4})\)$", re.ASCII)


def read_movielens(path: str | Path) -> MovieLens:
    """Read MovieLens-1M completely, or raise at the first thing that is not as it should be.

    Args:
        path: ``ml-1m.zip``, the folder it unpacks to, or a folder that holds either.
    Raises:
        DataError: The path is no such thing, a file is missing, damaged or not in the official
            format, a row repeats or refers to nobody, or pyarrow is not installed.
    """
    files = read_container(Path(path), tuple(_COLUMNS))
    user_ids, sex, age, occupation = _parse_users(files["users.dat"])
    movie_ids, titles, year, genres = _parse_movies(files["movies.dat"])
    users, items, timestamps = _parse_ratings(files["ratings.dat"], user_ids, movie_ids)
    return MovieLens(
        user_ids, movie_ids, sex, age, occupation, titles, year, genres, users, items, timestamps
    )


def _parse_users(file: DataFile) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, sex, age and occupation codes, each ``(U,)`` int64."""
    seen: dict[int, int] = {}
    codes: list[tuple[int, int, int]] = []
    for line, (user, sex, age, occupation, _) in file.rows(_COLUMNS["users.dat"]):
        _note_id(file, seen, line, "UserID", user)
        if sex not in SEXES:
            raise file.error(line, f"a Gender of {SEXES}", repr(sex))
        if (years := file.integer(line, "Age", age)) not in AGES:
            raise file.error(line, f"an Age of {AGES}", years)
        if (work := file.integer(line, "Occupation", occupation)) >= NUM_OCCUPATIONS:
            raise file.error(line, f"an Occupation of 0..{NUM_OCCUPATIONS - 1}", work)
        codes.append((SEXES.index(sex), AGES.index(years), work))
    sexes, ages, occupations = torch.tensor(codes).T.contiguous().unbind()
    return torch.tensor(list(seen)), sexes, ages, occupations


def _parse_movies(file: DataFile) -> tuple[Tensor, list[str], Tensor, Tensor]:
    """Ids ``(I,)``, titles, years ``(I,)`` and genre flags ``(I, 18)``."""
    seen: dict[int, int] = {}
    titles: list[str] = []
    years: list[int] = []
    flags: list[list[float]] = []
    for line, (movie, title, genres) in file.rows(_COLUMNS["movies.dat"]):
        _note_id(file, seen, line, "MovieID", movie)
        if not (year := _YEAR.search(title)):
            raise file.error(line, "a Title that ends in its year, like 'Heat (1995)'", repr(title))
        names = genres.split("|")
        for name in names:
            if name not in GENRES or names.count(name) > 1:
                expected = f"Genres of {', '.join(GENRES)}, joined by '|', each once"
                raise file.error(line, expected, f"{name!r} in {genres!r}")
        titles.append(title)
        years.append(int(year.group(1)))
        flags.append([float(name in names) for name in GENRES])
    return torch.tensor(list(seen)), titles, torch.tensor(years), torch.tensor(flags)


def _note_id(file: DataFile, seen: dict[int, int], line: int, column: str, text: str) -> None:
    """Add an id with its line to ``seen``; raise where it is there already."""
    number = file.integer(line, column, text)
    if number in seen:
        got = f"{number} of line {seen[number]} again"
        raise file.error(line, f"each {column} once", got)
    seen[number] = line


def _parse_ratings(
    file: DataFile, user_ids: Tensor, movie_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """User rows, movie rows and timestamps, each ``(P,)`` int64."""
    columns = _bulk_integers(file)
    if columns is None:
        raise _bad_rating_line(file)
    user, movie, rating, timestamps = columns
    # No line was skipped, so row r is line r + 1.
    if (row := first_true((rating < 1) | (rating > 5))) is not None:
        raise file.error(row + 1, "a Rating of 1..5", int(rating[row]))
    users, known = look_up(user_ids, user)
    if (row := first_true(~known)) is not None:
        raise file.error(row + 1, "a UserID of users.dat", int(user[row]))
    items, known = look_up(movie_ids, movie)
    if (row := first_true(~known)) is not None:
        raise file.error(row + 1, "a MovieID of movies.dat", int(movie[row]))
    if repeat := first_repeat(users * len(movie_ids) + items):
        first, row = repeat
        got = f"user {int(user[row])} and movie {int(movie[row])} of line {first + 1} again"
        raise file.error(row + 1, "each pair of user and movie once", got)
    return users, items, timestamps


def _bulk_integers(file: DataFile) -> list[Tensor] | None:
    """The four columns of ratings, ``(P,)`` int64 each; None where any line is not in format."""
    arrow, csv = _pyarrow()
    data = file.text()
    # pyarrow's integers admit blanks, signs and hexadecimal; the format does not.
    if data.translate(None, b"0123456789:\n"):
        return None
    # A "::" is two one-character delimiters around a column that must stay empty.
    types = {name: arrow.null() if name in "xyz" else arrow.int64() for name in "uxmyrzt"}
    try:
        table = csv.read_csv(
            arrow.BufferReader(data),
            read_options=csv.ReadOptions(column_names=list(types)),
            parse_options=csv.ParseOptions(
                delimiter=":", quote_char=False, ignore_empty_lines=False
            ),
            convert_options=csv.ConvertOptions(column_types=types, null_values=[""]),
        )
    except ValueError:
        return None
    columns = [table.column(name).combine_chunks() for name in "umrt"]
    if any(column.null_count for column in columns):
        return None
    return [from_dlpack(column).clone() for column in columns]


def _bad_rating_line(file: DataFile) -> DataError:
    """The error of the first line out of format, found line by line."""
    columns = _COLUMNS["ratings.dat"]
    try:
        for line, fields in file.rows(columns):
            for column, text in zip(columns, fields, strict=True):
                file.integer(line, column, text)
    except DataError as error:
        return error
    return file.error(None, "::".join(columns), "a table that cannot be read")


def _pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.csv")
    except ImportError as error:
        raise DataError(
            "reading ratings.dat needs pyarrow, which is not installed. "
            'Run: pip install "maskmoe_kernels[data]"'
        ) from error
