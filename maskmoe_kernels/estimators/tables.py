"""Tables of pandas, polars, Arrow and numpy, read as named columns of numbers or of categories."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import narwhals as nw
import numpy as np
from numpy.typing import NDArray
from sklearn.utils import check_array

Array = NDArray[Any]
NUMBERS, CATEGORIES = "numbers", "categories"
_DATES = (nw.Date, nw.Datetime, nw.Duration, nw.Time)
_TEXT = (nw.String, nw.Categorical, nw.Enum)


@dataclass(frozen=True)
class Table:
    """Columns side by side.

    Attributes:
        names: Of the columns; those of an array are ``x0``, ``x1`` and so on.
        kinds: ``"numbers"`` or ``"categories"``, for each column.
        columns: Numbers as float64 ``(rows,)``, where NaN is missing; categories as an object
            array ``(rows,)`` of ``str``, where ``None`` is missing.
        rows: How many rows there are.
        labels: The names as a DataFrame had them; ``None`` for an array.
    """

    names: list[str]
    kinds: list[str]
    columns: list[Array]
    rows: int
    labels: list[Any] | None = None

    def taken(self, rows: Array) -> Table:
        """The rows of these numbers, or where this mask is true."""
        columns = [column[rows] for column in self.columns]
        count = int(rows.sum()) if rows.dtype == bool else len(rows)
        return Table(self.names, self.kinds, columns, count, self.labels)


def read_table(x: Any, categorical: Iterable[str | int] | None = None) -> Table:
    """The columns of a DataFrame (pandas, polars, Arrow and others) or of an array.

    Args:
        x: ``(rows, columns)``.
        categorical: Columns whose numbers are names of categories, by name or position.

    Raises:
        ValueError: Not two axes, no rows or columns, two columns of one name, dates, lists, an
            infinite number, or ``categorical`` names what is not there.
        TypeError: Sparse data, a lazy frame, or a cell that is neither number nor text.
    """
    try:
        frame = nw.from_native(x, pass_through=True, allow_series=True)
    except nw.exceptions.DuplicateError as error:
        raise ValueError(
            f"X has columns of the same name; rename them, so that each has its own. {error}"
        ) from None
    if isinstance(frame, nw.LazyFrame):
        raise TypeError("X is a lazy frame, whose rows are not there yet; pass X.collect()")
    labels = None
    if isinstance(frame, nw.DataFrame):
        names, columns = _of_frame(frame)
        labels = [*frame.columns]
    elif isinstance(frame, nw.Series):
        raise ValueError(
            "X must be a table, got a single column. Reshape your data: pass X.to_frame()"
        )
    else:
        names, columns = _of_array(x)
    asked = _positions(categorical, names)
    found = [
        (CATEGORIES, as_categories(column)) if k in asked and column.dtype != object
        else (CATEGORIES if column.dtype == object else NUMBERS, column)
        for k, column in enumerate(columns)
    ]  # fmt: skip
    for name, (kind, column) in zip(names, found, strict=True):
        if kind == NUMBERS:
            _refuse_infinite(name, column)
    kinds, arrays = [kind for kind, _ in found], [column for _, column in found]
    return Table(names, kinds, arrays, len(columns[0]), labels)


def as_categories(column: Array) -> Array:
    """Numbers as text, whole ones without a point; NaN becomes ``None``."""
    texts = np.empty(len(column), dtype=object)
    texts[:] = [_as_text(value) for value in column.tolist()]
    return texts


def _as_text(value: Any) -> str | None:
    if _missing(value):
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _of_frame(frame: Any) -> tuple[list[str], list[Array]]:
    names = [str(name) for name in frame.columns]
    if not names:
        raise ValueError("X has no columns: 0 feature(s) while a minimum of 1 is required.")
    if len(frame) == 0:
        raise ValueError("X has no rows: 0 sample(s) while a minimum of 1 is required.")
    return names, [_of_series(*pair) for pair in zip(names, frame.iter_columns(), strict=True)]


def _of_series(name: str, series: Any) -> Array:
    kind = series.dtype
    if kind.is_numeric() or kind == nw.Boolean:
        return _floats(series)
    if kind in _DATES:
        raise ValueError(
            f"column {name!r} holds dates or times ({kind}), which have no order of magnitude; "
            "put what matters about them into columns of their own (days since a date, month, "
            "weekday, hour)"
        )
    if kind in _TEXT:
        return as_categories(np.array(series.to_list(), dtype=object))
    if kind in (nw.Object, nw.Unknown):
        return _of_objects(repr(name), series.to_list())
    raise ValueError(
        f"column {name!r} is of the type {kind}; expected numbers, booleans, text or categories. "
        "Make columns of what it holds, or leave it out"
    )


def _floats(series: Any) -> Array:
    if series.is_null().any() or series.dtype == nw.Boolean or series.dtype == nw.Decimal:
        values = [np.nan if _missing(value) else float(value) for value in series.to_list()]
        return np.array(values, dtype=np.float64)
    return np.array(series.to_numpy(), dtype=np.float64)


def _of_array(x: Any) -> tuple[list[str], list[Array]]:
    array = check_array(x, dtype=None, ensure_all_finite=False, input_name="X")
    names = [f"x{k}" for k in range(array.shape[1])]
    if array.dtype.kind in "biuf":
        floats = np.array(array, dtype=np.float64)
        return names, [np.ascontiguousarray(column) for column in floats.T]
    if array.dtype.kind in "mM":
        raise ValueError(
            "X holds dates or times, which have no order of magnitude; put what matters about them "
            "into columns of their own (days since a date, month, weekday, hour)"
        )
    return names, [
        _of_objects(name, column) for name, column in zip(names, array.T.tolist(), strict=True)
    ]


def _of_objects(name: str, values: Sequence[Any]) -> Array:
    """A column of any objects: numbers, or text; missing are ``None``, NaN and ``pandas.NA``."""
    present = [value for value in values if not _missing(value)]
    if all(isinstance(value, str) for value in present) and present:
        return as_categories(np.array([None if _missing(v) else v for v in values], dtype=object))
    for value in present:
        if isinstance(value, complex):
            raise ValueError(f"Complex data not supported: column {name} holds {value!r}")
        if not isinstance(value, (numbers.Real, str)) and not hasattr(value, "__float__"):
            raise TypeError(
                f"column {name} holds {value!r} of the type {type(value).__name__}; argument must "
                "be a string or a number"
            )
    texts = [value for value in present if isinstance(value, str)]
    if texts:
        number = next(value for value in present if not isinstance(value, str))
        raise ValueError(
            f"column {name} holds text and numbers, {texts[0]!r} and {number!r} for instance; make "
            "all of it numbers, or all of it text (column.astype(str))"
        )
    return np.array([np.nan if _missing(v) else float(v) for v in values], dtype=np.float64)


def _missing(value: Any) -> bool:
    if value is None:
        return True
    try:
        return bool(value != value)
    except TypeError:  # pandas.NA has no truth value
        return type(value).__name__ == "NAType"
    except ValueError:  # an array in a cell
        return False


def _refuse_infinite(name: str, column: Array) -> None:
    infinite = np.isinf(column)
    if infinite.any():
        row = int(infinite.argmax())
        raise ValueError(
            f"column {name!r} holds infinity, first in row {row}; replace it by a finite number, "
            "or by NaN if it means a missing value"
        )


def _positions(categorical: Iterable[str | int] | None, names: list[str]) -> set[int]:
    if categorical is None:
        return set()
    if isinstance(categorical, str) or not isinstance(categorical, Iterable):
        raise ValueError(
            f"categorical must be a list of columns, got {categorical!r}; write [{categorical!r}]"
        )
    found = set()
    for column in categorical:
        if isinstance(column, (int, np.integer)) and 0 <= column < len(names):
            found.add(int(column))
        elif column in names:
            found.add(names.index(str(column)))
        else:
            raise ValueError(f"categorical names {column!r}, which is no column of X: {names[:20]}")
    return found
