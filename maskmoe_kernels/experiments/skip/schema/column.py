"""One column of a table and its valid values."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date

#: Longest id that is accepted, in characters.
ID_LENGTH = 64
#: The kinds of columns.
KINDS = ("id", "flag", "integer", "number", "name", "date", "time")
#: Units of whole numbers that are times -> milliseconds.
UNITS = {"s": 1000, "ms": 1}

#: The spellings of true and of false.
TRUE, FALSE = ("true", "True", "TRUE", "1"), ("false", "False", "FALSE", "0")
_BOOLEANS = dict.fromkeys((*TRUE, "1.0"), 1) | dict.fromkeys((*FALSE, "0.0"), 0)
# Tables with a missing value anywhere in a column are often exported with 7.0 for 7.
_WHOLE = re.compile(r"([+-]?\d{1,9})(\.0*)?", re.ASCII)
_ISO = re.compile(r"(\d{4})-(\d\d)-(\d\d)", re.ASCII)
_SHORT = re.compile(r"(\d\d)-(\d\d)-(\d\d)", re.ASCII)
_EPOCH = date(1970, 1, 1).toordinal()


@dataclass(frozen=True)
class Column:
    """One column of a table and its valid values.

    Attributes:
        name: Name in the csv header and in the shards.
        kind: One of ``KINDS``; a flag is true or false, an integer or number lies in a range, a
            name is one of ``names``, a time is an instant.
        low: Smallest valid integer or number.
        high: Largest valid integer or number.
        names: Valid values of the kind ``name``; shards hold the index into them.
        numbered: Whether the index of a name may stand for it.
        log: Whether a number is replaced by log(x), or with ``"1p"`` by log(1 + x), before it is
            normalised.
        least: Smaller numbers are replaced by this one before they are normalised.
        logit: ``(a, b)``: a number is replaced by log((x - a) / (b - x)).
        unit: Of whole numbers that are times, a key of ``UNITS``.
    """

    name: str
    kind: str
    low: float = 0
    high: float = 1
    names: tuple[str, ...] = ()
    numbered: bool = False
    log: str = ""
    least: float | None = None
    logit: tuple[float, float] | None = None
    unit: str = "s"

    @property
    def one_hot(self) -> bool:
        """Whether the column of a table of items or users is a feature for each of its names."""
        return self.kind == "name" and not self.numbered

    @property
    def expected(self) -> str:
        """The valid values, in words for an error message."""
        match self.kind:
            case "id":
                return f"an id of 1 to {ID_LENGTH} characters"
            case "flag":
                return "true or false"
            case "name":
                return f"one of {', '.join(self.names)}"
            case "date":
                return "a date as yyyy-mm-dd or dd-mm-yy"
            case "time":
                return "a time from 1970 to 2200"
        noun = "a whole number" if self.kind == "integer" else "a number"
        return f"{noun} from {self.low:g} to {self.high:g}"

    @property
    def remedy(self) -> str:
        """How the valid values are written, for an error message."""
        match self.kind:
            case "id":
                how = "Give the row its id"
            case "flag":
                how = "Write true, True, TRUE or 1, and false, False, FALSE or 0"
            case "name":
                how = "Write one of these names"
                if self.numbered:
                    how += ", or " + ", ".join(f"{i} for {n}" for i, n in enumerate(self.names))
            case "date":
                how = "Write it like 2018-07-15 or 15-07-18"
            case "time":
                return f"Write it like 2018-07-15T20:15:00, or as a whole number of {self.unit}."
            case "integer":
                how = "Write it in digits, like 1 or 1.0"
            case _:
                how = "Write it with a decimal point, like 0.5 or 5e-1"
        return f"{how}, or restore the official file."

    def parse(self, text: str) -> int | None:
        """The value of one field of the kind flag, integer, name or date; None if it has none.

        A flag is 0 or 1, a name its index, a date the days from 1970-01-01. Spaces around do not
        count, as pyarrow ignores them around numbers.
        """
        text = text.strip(" \t")
        match self.kind:
            case "flag":
                return _BOOLEANS.get(text)
            case "name" if text in self.names:
                return self.names.index(text)
            case "name" if not self.numbered:
                return None
            case "date":
                return parse_date(text)
        if match := _WHOLE.fullmatch(text):
            value = int(match[1])
            return value if self.kind == "integer" or 0 <= value < len(self.names) else None
        return _BOOLEANS.get(text) if self.kind == "integer" and self.high == 1 else None


def parse_date(text: str) -> int | None:
    """Days from 1970-01-01 to a date ``yyyy-mm-dd`` or ``dd-mm-yy``; None if it is neither."""
    if match := _ISO.fullmatch(text):
        year, month, day = map(int, match.groups())
    elif match := _SHORT.fullmatch(text):
        day, month, year = map(int, match.groups())
        year += 2000
    else:
        return None
    try:
        return date(year, month, day).toordinal() - _EPOCH
    except ValueError:
        return None
