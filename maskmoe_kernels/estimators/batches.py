"""Tables larger than memory: batches that come in every pass, or a folder of Parquet files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskmoe_kernels.estimators.tables import CATEGORIES, NUMBERS, Array, Table

#: Rows of a batch of Parquet files.
_ROWS = 65_536


@dataclass(frozen=True)
class Batch:
    """Rows with what is to be learned.

    Attributes:
        x: DataFrame or array, ``(rows, columns)``.
        y: ``(rows,)``.
        weight: How often each row counts, ``(rows,)``, or ``None``.
    """

    x: Any
    y: Any
    weight: Any


@dataclass(frozen=True)
class Drawn:
    """Rows drawn evenly from all batches, in a random order.

    Attributes:
        table: Their columns.
        y: As the batches had it, ``(rows,)``.
        weight: ``(rows,)``.
        number: Of each row among all rows of the batches, ``(rows,)``.
        total: Rows of all batches.
    """

    table: Table
    y: Array
    weight: Array
    number: Array
    total: int


def passes_over(batches: Any, target: str | None) -> Callable[[], Iterator[Batch]]:
    """A function that begins a new pass over the batches.

    Args:
        batches: ``(X, y)`` or ``(X, y, sample_weight)`` one after the other: a list of them, a
            function that returns an iterator, or an object with ``__iter__`` that does; or the path
            of a folder of Parquet files, or of one file.
        target: The column of the files that holds y.

    Raises:
        ValueError: An iterator, which gives its batches only once; a target with batches that are
            no files, or files without one.
        FileNotFoundError: There is nothing at the path.
        ModuleNotFoundError: Parquet files, and pyarrow is not installed.
    """
    if isinstance(batches, (str, Path)):
        return _of_files(Path(batches), target)
    if target is not None:
        raise ValueError(
            f"target={target!r} names a column of files; batches of (X, y) bring their y, so leave "
            "it out"
        )
    if callable(batches):
        return lambda: map(_checked, iter(batches()))
    if not isinstance(batches, Iterable):
        raise ValueError(
            "batches must be a path, a function that returns an iterator of (X, y), or a list of "
            f"them, got {type(batches).__name__}"
        )
    if iter(batches) is batches:
        raise ValueError(
            "batches is an iterator, whose batches come only once, and fit_batches passes over "
            "them several times; pass the function that makes it: fit_batches(lambda: read(...))"
        )
    return lambda: map(_checked, iter(batches))


def _checked(batch: Any) -> Batch:
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise ValueError(
            f"a batch must be (X, y) or (X, y, sample_weight), got {type(batch).__name__}"
        )
    return Batch(*batch, *([None] if len(batch) == 2 else []))


def _of_files(path: Path, target: str | None) -> Callable[[], Iterator[Batch]]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    try:
        import pyarrow
        from pyarrow import dataset
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "Parquet files need pyarrow: pip install 'maskmoe_kernels[data]'"
        ) from None
    try:
        files = dataset.dataset(path, format="parquet")
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet ({error})") from None
    if not files.files:
        raise ValueError(f"{path}: holds no Parquet files")
    if target not in files.schema.names:
        raise ValueError(
            f"target must name the column that holds y, got {target!r}; the files have "
            f"{files.schema.names[:20]}"
        )

    # As pandas reads its own files: an index is no column.
    index = (files.schema.pandas_metadata or {}).get("index_columns", [])
    columns = [name for name in files.schema.names if name == target or name not in index]

    def batches() -> Iterator[Batch]:
        for part in files.to_batches(columns=columns, batch_size=_ROWS):
            if part.num_rows:
                rows = pyarrow.Table.from_batches([part])
                y = rows.column(target).to_pandas().to_numpy()
                yield Batch(rows.drop_columns([target]), y, None)

    return batches


def drawn_from(
    batches: Iterable[tuple[Table, Array, Array]], most: int, random: np.random.Generator
) -> Drawn:
    """At most so many rows of weight above 0, each as likely as every other.

    Each row is given a random number; those with the smallest stay.

    Args:
        batches: Table, y and weight of each.
        most: Rows to be kept at once.
        random: Of the draw.

    Raises:
        ValueError: There is no batch, or batches have other columns than the first.
    """
    kept: Drawn | None = None
    keys = np.empty(0)
    total = 0
    for table, y, weight in batches:
        number = np.flatnonzero(weight > 0)
        mine = random.random(len(number))
        new = Drawn(table.taken(number), y[number], weight[number], total + number, 0)
        total += table.rows
        kept = new if kept is None else _joined(kept, new)
        keys = np.concatenate([keys, mine])
        order = np.argsort(keys, kind="stable")[:most]
        keys = keys[order]
        kept = Drawn(kept.table.taken(order), kept.y[order], kept.weight[order],
                     kept.number[order], 0)  # fmt: skip
    if kept is None:
        raise ValueError("there is no batch: the iterator ended at once, or the files have no rows")
    return Drawn(kept.table, kept.y, kept.weight, kept.number, total)


def _joined(a: Drawn, b: Drawn) -> Drawn:
    tables = a.table, b.table
    kinds = [
        CATEGORIES if CATEGORIES in pair else NUMBERS
        for pair in zip(*(table.kinds for table in tables), strict=True)
    ]
    columns = [
        np.concatenate([_as(kind, table, k) for table in tables]) for k, kind in enumerate(kinds)
    ]
    rows = a.table.rows + b.table.rows
    table = Table(a.table.names, kinds, columns, rows, a.table.labels)
    y, weight = np.concatenate([a.y, b.y]), np.concatenate([a.weight, b.weight])
    return Drawn(table, y, weight, np.concatenate([a.number, b.number]), 0)


def _as(kind: str, table: Table, k: int) -> Array:
    """A column; one of numbers that are all missing may be one of text."""
    column = table.columns[k]
    if table.kinds[k] == kind:
        return column
    if not np.isnan(column).all():
        raise ValueError(
            f"column {table.names[k]!r} holds numbers in one batch and text in another, "
            f"{column[~np.isnan(column)][0]:g} for instance; pass one kind: column.astype(str)"
        )
    return np.full(len(column), None, dtype=object)
