"""A mutant: one small change of one source file, as text put in the place of text."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """``text[start:end]`` of a file becomes ``new``."""

    file: str  # from the root of the checkout
    start: int
    end: int
    new: str
    operator: str
    number: int  # of its first line, from 1
    line: str  # the lines it touches, white space collapsed
    becomes: str  # the same lines after the change
    function: str  # that it lies in; "" outside of one

    @property
    def name(self) -> str:
        """What ``--only`` is matched with; unique in a tree, but for twins on one line."""
        return f"{self.file}:{self.number}: {self.operator}: {self.line} -> {self.becomes}"

    @property
    def identity(self) -> str:
        """The same where other lines of the file have changed."""
        return f"{self.file}: {self.operator}: {self.line} -> {self.becomes}"


def mutant(
    file: str, text: str, span: tuple[int, int], new: str, operator: str, function: str
) -> Mutant:
    """The mutant that puts ``new`` in the place of ``text[span]``."""
    start, end = span
    first = text.rfind("\n", 0, start) + 1
    last = text.find("\n", end)
    last = len(text) if last < 0 else last
    line, becomes = text[first:last], text[first:start] + new + text[end:last]
    number = text.count("\n", 0, start) + 1
    collapsed = (" ".join(part.split()) for part in (line, becomes))
    return Mutant(file, start, end, new, operator, number, *collapsed, function)


def apply(text: str, changes: Iterable[Mutant]) -> str:
    """``text`` with changes that do not overlap."""
    for change in sorted(changes, key=lambda m: m.start, reverse=True):
        text = text[: change.start] + change.new + text[change.end :]
    return text


def sample(mutants: Iterable[Mutant], count: int, seed: int) -> list[Mutant]:
    """``count`` of them, no two of which touch the same text.

    Places are drawn, then one of the changes at a place: one with many is no more likely. The draw
    is by content, so that code which is added or taken out elsewhere leaves the others drawn.
    """
    places: dict[tuple[str, int, int], list[Mutant]] = defaultdict(list)
    for each in mutants:
        places[each.file, each.start, each.end].append(each)
    drawn = [min(there, key=lambda m: _lot(seed, m.identity)) for there in places.values()]
    drawn.sort(key=lambda m: (_lot(seed, "place", m.identity), m.start))
    taken: dict[str, list[tuple[int, int]]] = defaultdict(list)
    chosen: list[Mutant] = []
    for each in drawn:
        if len(chosen) == count:
            break
        if all(each.end <= start or end <= each.start for start, end in taken[each.file]):
            taken[each.file].append((each.start, each.end))
            chosen.append(each)
    return chosen


def _lot(seed: int, *parts: str) -> bytes:
    return hashlib.sha256("\0".join([str(seed), *parts]).encode()).digest()
