"""Checked access to a TOML file; every error names the file and the line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from maskmoe_kernels.errors import DataError

T = TypeVar("T")
#: Keys on the way to a value; a number is a place in an array.
Place = tuple[str | int, ...]
_KEY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
_TABLE = re.compile(r"\s*\[\s*([^\[\]]+?)\s*\]\s*(#.*)?$")
_KINDS = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false",
    list: "an array", dict: "a table",
}  # fmt: skip


class Node:
    """A table of a TOML file. Keys that nobody asked for are errors; see :meth:`finish`.

    Args:
        name: Of the file, for messages.
        lines: Where each key of the file stands.
        value: The table.
        place: Keys on the way to it.
    """

    def __init__(
        self, name: str, lines: Mapping[Place, int], value: dict[str, Any], place: Place = ()
    ):
        self.name, self.lines, self.value, self.place = name, lines, value, place
        self._asked: set[str] = set()

    @classmethod
    def parse(cls, text: str, name: str) -> Node:
        """Read a file.

        Args:
            text: Its content.
            name: Its name, for messages.
        Raises:
            DataError: It is no TOML.
        """
        try:
            value = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            found = re.search(r"\(at line (\d+), column \d+\)|\(at end of document\)", str(error))
            line = int(found[1]) if found and found[1] else text.count("\n") + 1
            what = re.sub(r" \(at .*\)$", "", str(error))
            raise DataError(f"{name}, line {line}: expected TOML, got an error: {what}.") from error
        return cls(name, dict(_lines(text)), value)

    def __contains__(self, key: str) -> bool:
        return key in self.value

    def fail(self, message: str, *keys: str | int) -> DataError:
        """An error about the value at ``keys`` in this table, or what is nearest to it."""
        place = (*self.place, *keys)
        while place and not any(other[: len(place)] == place for other in self.lines):
            place = place[:-1]
        # Of a table without a line of its own, the first line of those in it.
        inside = [n for other, n in self.lines.items() if place and other[: len(place)] == place]
        line = self.lines.get(place, min(inside, default=1))
        return DataError(f"{self.name}, line {line}: {message}")

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The value of a key.

        Args:
            key: The key.
            kind: ``str``, ``int``, ``float`` (whole numbers, too), ``bool`` or ``list``.
            default: Value where the key is missing; ``None``: it may not be missing.
        Raises:
            DataError: The key is missing, or its value is of another kind.
        """
        self._asked.add(key)
        if key not in self.value:
            if default is None:
                here = ".".join(map(str, self.place)) or "the file"
                raise self.fail(f"expected {key} in {here}, got {sorted(self.value)}.")
            return default
        value = self.value[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise self.fail(f"expected {key} to be {_KINDS[kind]}, got {value!r}.", key)
        return value

    def optional(self, key: str, kind: type[T]) -> T | None:
        """The value of a key, or ``None`` where it is missing."""
        self._asked.add(key)
        return self.get(key, kind) if key in self.value else None

    def names(self, key: str, default: list[str] | None = None) -> tuple[str, ...]:
        """An array of different texts."""
        found = self.get(key, list, default)
        if not all(isinstance(one, str) for one in found) or len(set(found)) != len(found):
            raise self.fail(f"expected {key} to be an array of different texts, got {found}.", key)
        return tuple(found)

    def choice(self, key: str, known: tuple[str, ...], default: str | None = None) -> str:
        """One of several texts."""
        found = self.get(key, str, default)
        if found not in known:
            raise self.fail(f"expected {key} to be one of {', '.join(known)}, got {found!r}.", key)
        return found

    def table(self, key: str) -> Node:
        """A table in this one; an empty one where the key is missing."""
        self._asked.add(key)
        value = self.value.get(key, {})
        if not isinstance(value, dict):
            raise self.fail(f"expected {key} to be a table, got {value!r}.", key)
        return Node(self.name, self.lines, value, (*self.place, key))

    def tables(self) -> Iterator[tuple[str, Node]]:
        """Each key of this table with its table."""
        for key in self.value:
            yield key, self.table(key)

    def array(self, key: str) -> list[Node]:
        """The tables of an array; a text stands for a table with ``of`` alone."""
        nodes = []
        for i, value in enumerate(self.get(key, list)):
            value = {"of": value} if isinstance(value, str) else value
            if not isinstance(value, dict):
                raise self.fail(f"expected names or tables in {key}, got {value!r}.", key, i)
            nodes.append(Node(self.name, self.lines, value, (*self.place, key, i)))
        return nodes

    def finish(self) -> None:
        """Check that no key is left that nobody asked for.

        Raises:
            DataError: There is one.
        """
        for key in self.value:
            if key not in self._asked:
                known = ", ".join(sorted(self._asked))
                raise self.fail(f"expected one of the keys {known}, got {key!r}.", key)


def _lines(text: str) -> Iterator[tuple[Place, int]]:
    """Where each table, key, and element of an array that begins a line stands."""
    table: Place = ()
    key: Place = ()
    element = 0
    for number, line in enumerate(text.splitlines(), 1):
        if found := _TABLE.match(line):
            table = key = _split(found[1])
            yield table, number
        elif found := _KEY.match(line):
            key, element = (*table, *_split(found[1])), 0
            yield key, number
        elif line.lstrip().startswith(("{", '"')):
            yield (*key, element), number
            element += 1


def _split(dotted: str) -> Place:
    parts = re.findall(r"""[\w-]+|"[^"]*"|'[^']*'""", dotted)
    return tuple(part.strip("\"'") for part in parts)
