"""MovieLens-1M: a strict reader, the leave-one-out split, and negatives for training and test.

The data set is described in Harper and Konstan (2015), "The MovieLens Datasets: History and
Context". It may not be redistributed, so a user brings the official ``ml-1m.zip``.
"""

from __future__ import annotations

import gzip
import importlib
import io
import lzma
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from maskmoe_kernels.errors import DataError

SEXES = ("F", "M")
AGES = (1, 18, 25, 35, 45, 50, 56)
NUM_OCCUPATIONS = 21
# The order of the official README.
GENRES = (
    "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
    "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller",
    "War", "Western",
)  # fmt: skip

_COLUMNS = {
    "users.dat": ("UserID", "Gender", "Age", "Occupation", "Zip-code"),
    "movies.dat": ("MovieID", "Title", "Genres"),
    "ratings.dat": ("UserID", "MovieID", "Rating", "Timestamp"),
}
_RESTORE = (
    "Correct it, or restore the official file from https://grouplens.org/datasets/movielens/1m/."
)
# What zipfile and gzip raise on damage: ValueError for a bad offset, RuntimeError for a bad flag.
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
    EOFError, OSError, RuntimeError, ValueError,
)  # fmt: skip
#: Largest file that is read, packed or unpacked; the official ratings.dat has 24.6 MB.
LIMIT = 256 << 20
_FOREIGN = "The negatives must belong to this data set and this split."
_YEAR = re.compile(r"\((\d{4})\)$", re.ASCII)
_CONTROL = re.compile(rb"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
_PAIR = re.compile(r"\((\d{1,18}),(\d{1,18})\)", re.ASCII)


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


@dataclass(frozen=True)
class _File:
    """The bytes of one data file and the name by which errors call it."""

    name: str
    data: bytes

    def error(
        self, line: int | None, expected: str, got: object, remedy: str = _RESTORE
    ) -> DataError:
        where = self.name if line is None else f"{self.name}, line {line}"
        return DataError(f"{where}: expected {expected}, got {got}. {remedy}")

    def text(self) -> bytes:
        """The bytes with newline line ends; raises where the file is empty or cut in a line."""
        if not self.data.strip():
            raise self.error(1, "at least one line", "an empty file")
        data = self.data.replace(b"\r\n", b"\n")
        # Without it a number cut in half would pass for a whole one.
        if not data.endswith(b"\n"):
            count = data.count(b"\n") + 1
            remedy = "It may be cut short; if it is whole, end it with a newline."
            raise self.error(count, "a newline at the end of the last line", "none", remedy)
        return data

    def latin1_lines(self) -> Iterator[str]:
        """Decoded lines; raises on control characters and on text re-encoded as UTF-8."""
        data = self.text()
        if control := _CONTROL.search(data):
            line = data.count(b"\n", 0, control.start()) + 1
            raise self.error(line, "latin-1 text", f"the control byte {control.group()!r}")
        accented = re.search(rb"[^\x00-\x7f]", data)
        if accented and _is_utf8(data):
            line = data.count(b"\n", 0, accented.start()) + 1
            remedy = "Convert it with `iconv -f utf-8 -t latin1`, or restore the official file."
            raise self.error(line, "latin-1 text", "UTF-8", remedy)
        # One by one: a list of as many as there may be would be many times the file.
        return (line[:-1].decode("latin-1") for line in io.BytesIO(data))

    def rows(self, columns: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
        """Line numbers from 1 and their ``::``-separated fields, exactly one a column."""
        for line, text in enumerate(self.latin1_lines(), start=1):
            fields = text.split("::")
            if len(fields) != len(columns):
                expected = f"{len(columns)} columns {'::'.join(columns)}"
                raise self.error(line, expected, f"{len(fields)} in {text!r}")
            yield line, fields

    def integer(self, line: int, column: str, text: str) -> int:
        # At most 18 digits: every such number fits int64.
        if not (text.isascii() and text.isdigit() and len(text) <= 18):
            raise self.error(line, f"a whole number in column {column}", repr(text))
        return int(text)


def read_movielens(path: str | Path) -> MovieLens:
    """Read MovieLens-1M completely, or raise at the first thing that is not as it should be.

    Args:
        path: ``ml-1m.zip``, the folder it unpacks to, or a folder that holds either.
    Raises:
        DataError: The path is no such thing, a file is missing, damaged or not in the official
            format, a row repeats or refers to nobody, or pyarrow is not installed.
    """
    files = _read_container(Path(path))
    user_ids, sex, age, occupation = _parse_users(files["users.dat"])
    movie_ids, titles, year, genres = _parse_movies(files["movies.dat"])
    users, items, timestamps = _parse_ratings(files["ratings.dat"], user_ids, movie_ids)
    return MovieLens(
        user_ids, movie_ids, sex, age, occupation, titles, year, genres, users, items, timestamps
    )


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
    file = _read_tsv(Path(path))
    pairs, negatives = _parse_negatives(file, per_user)
    users = _users_of_negatives(file, pairs, data, split)
    items, known = _look_up(data.movie_ids, negatives.flatten())
    if (row := _first(~known)) is not None:
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
    if ratio and (row := _first(~has_choice[split.train_users])) is not None:
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


def _read_container(path: Path) -> dict[str, _File]:
    """The three files as bytes, all read before any is parsed."""
    if path.is_dir():
        for folder in (path, path / "ml-1m"):
            if any((folder / name).exists() for name in _COLUMNS):
                return {name: _read_plain(folder / name) for name in _COLUMNS}
        if (path / "ml-1m.zip").is_file():
            return _read_zip(path / "ml-1m.zip")
        raise DataError(
            f"{path}: expected {', '.join(_COLUMNS)} or ml-1m.zip in this folder, "
            f"got {sorted(entry.name for entry in path.iterdir())[:8]}. {_RESTORE}"
        )
    return _read_zip(path)


def _read_plain(path: Path) -> _File:
    try:
        with path.open("rb") as file:
            return _File(str(path), _bounded(file, str(path), path.stat().st_size))
    except OSError as error:
        raise DataError(
            f"{path}: expected a readable file, got {error.strerror}. {_RESTORE}"
        ) from error


def _read_zip(path: Path) -> dict[str, _File]:
    whole = _read_plain(path)
    try:
        with zipfile.ZipFile(io.BytesIO(whole.data)) as archive:
            names = set(archive.namelist())
            prefix = "ml-1m/" if any(f"ml-1m/{name}" in names for name in _COLUMNS) else ""
            # read() verifies each file's checksum.
            files = {
                name: _unpacked(archive, prefix + name, f"{path}:{prefix}{name}")
                for name in _COLUMNS
                if prefix + name in names
            }
    except DataError:
        raise
    except _DAMAGE as error:
        if not whole.data:
            got = "an empty file"
        elif not whole.data.startswith(b"PK"):
            got = f"a file that starts with {whole.data[:8]!r}"
        else:
            got = f"a zip that is damaged or cut short ({error})"
        expected = "ml-1m.zip or the folder it unpacks to"
        raise whole.error(None, expected, got, "Download it again.") from error
    for name in _COLUMNS:
        if name not in files:
            raise whole.error(None, f"{prefix}{name} in the zip", f"only {sorted(names)[:8]}")
    return files


def _unpacked(archive: zipfile.ZipFile, member: str, name: str) -> _File:
    with archive.open(member) as file:
        return _File(name, _bounded(file, name, archive.getinfo(member).file_size))


def _bounded(file: IO[bytes], name: str, declared: int) -> bytes:
    """All bytes of an open file: not more than ``LIMIT``, whatever size it declares to have.

    Raises:
        DataError: It holds more.
    """
    data = b"" if declared > LIMIT else file.read(LIMIT + 1)
    if declared > LIMIT or len(data) > LIMIT:
        got = max(declared, len(data))
        raise DataError(
            f"{name}: expected at most {LIMIT:,} bytes, unpacked, got {got:,} or more. {_RESTORE}"
        )
    return data


def _parse_users(file: _File) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def _parse_movies(file: _File) -> tuple[Tensor, list[str], Tensor, Tensor]:
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


def _note_id(file: _File, seen: dict[int, int], line: int, column: str, text: str) -> None:
    """Add an id with its line to ``seen``; raise where it is there already."""
    number = file.integer(line, column, text)
    if number in seen:
        got = f"{number} of line {seen[number]} again"
        raise file.error(line, f"each {column} once", got)
    seen[number] = line


def _parse_ratings(
    file: _File, user_ids: Tensor, movie_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """User rows, movie rows and timestamps, each ``(P,)`` int64."""
    columns = _bulk_integers(file)
    if columns is None:
        raise _bad_rating_line(file)
    user, movie, rating, timestamps = columns
    # No line was skipped, so row r is line r + 1.
    if (row := _first((rating < 1) | (rating > 5))) is not None:
        raise file.error(row + 1, "a Rating of 1..5", int(rating[row]))
    users, known = _look_up(user_ids, user)
    if (row := _first(~known)) is not None:
        raise file.error(row + 1, "a UserID of users.dat", int(user[row]))
    items, known = _look_up(movie_ids, movie)
    if (row := _first(~known)) is not None:
        raise file.error(row + 1, "a MovieID of movies.dat", int(movie[row]))
    if repeat := _first_repeat(users * len(movie_ids) + items):
        first, row = repeat
        got = f"user {int(user[row])} and movie {int(movie[row])} of line {first + 1} again"
        raise file.error(row + 1, "each pair of user and movie once", got)
    return users, items, timestamps


def _bulk_integers(file: _File) -> list[Tensor] | None:
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


def _bad_rating_line(file: _File) -> DataError:
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


def _read_tsv(path: Path) -> _File:
    """The file, unzipped where it starts as gzip does."""
    file = _read_plain(path)
    if not file.data.startswith(b"\x1f\x8b"):
        return file
    try:
        with io.BufferedReader(gzip.GzipFile(fileobj=io.BytesIO(file.data))) as packed:
            return _File(file.name, _bounded(packed, file.name, 0))
    except DataError:
        raise
    except _DAMAGE as error:
        got = f"one that is damaged or cut short ({error})"
        raise file.error(None, "a whole gzip file", got, "Fetch it again.") from error


def _parse_negatives(file: _File, per_user: int) -> tuple[Tensor, Tensor]:
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


def _users_of_negatives(file: _File, pairs: Tensor, data: MovieLens, split: Split) -> Tensor:
    """User row of each line, ``(U,)``; raises unless every user has one line and its test item."""
    users, known = _look_up(data.user_ids, pairs[:, 0])
    if (row := _first(~known)) is not None:
        raise file.error(row + 1, "a user of users.dat", int(pairs[row, 0]), _FOREIGN)
    if repeat := _first_repeat(users):
        first, row = repeat
        user = int(pairs[row, 0])
        raise file.error(row + 1, "each user once", f"user {user} of line {first + 1} again")
    absent = torch.ones(data.num_users, dtype=torch.bool)
    absent[users] = False
    if (row := _first(absent)) is not None:
        got = f"none for user {int(data.user_ids[row])}"
        raise file.error(None, f"one line for each of {data.num_users} users", got, _FOREIGN)
    positive = data.movie_ids[split.test[users]]
    if (row := _first(pairs[:, 1] != positive)) is not None:
        expected = f"the test item {int(positive[row])} of user {int(pairs[row, 0])}"
        raise file.error(row + 1, expected, int(pairs[row, 1]), _FOREIGN)
    return users


def _look_up(ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Row of each value in ``ids``, and whether it is there; rows of the others mean nothing."""
    ordered, rows = ids.sort()
    place = torch.searchsorted(ordered, values.contiguous()).clamp_(max=len(ids) - 1)
    return rows[place], ordered[place] == values


def _first(flags: Tensor) -> int | None:
    """Index of the first true flag of a ``(P,)`` tensor; None where all are false."""
    return int(flags.int().argmax()) if bool(flags.any()) else None


def _first_repeat(keys: Tensor) -> tuple[int, int] | None:
    """The first index whose key came before, after the index where it first came."""
    ordered, order = keys.sort(stable=True)
    later = order[1:][ordered[1:] == ordered[:-1]]
    if not len(later):
        return None
    row = int(later.min())
    return int((keys == keys[row]).nonzero()[0]), row


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
