"""Families by name, as the README, the benchmark and ``maskmoe info --layout`` call them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.subsets import SubsetFamily


def skip_sessions() -> tuple[SubsetFamily, dict[str, int]]:
    """The eight subsets of skip prediction, and the groups of the second half (section 4.3).

    Returns:
        Family over the groups of A, whose columns lie in the order of ``family.groups``; and
        group name to width of B, in the order of its columns.
    """
    family = SubsetFamily(
        {"position": 2, "context": 13, "interaction": 29, "popularity": 3, "music": 26},
        {
            "context": ["position", "context"],
            "interaction": ["position", "interaction"],
            "popularity": ["position", "popularity"],
            "music": ["position", "music"],
            "context+interaction": ["position", "context", "interaction"],
            "popularity+music": ["position", "popularity", "music"],
            "context+interaction+popularity": [
                "position", "context", "interaction", "popularity",
            ],
            "all": ["position", "context", "interaction", "popularity", "music"],
        },
    )  # fmt: skip
    return family, {name: family.groups[name] for name in ("position", "popularity", "music")}


def _ncf4() -> SubsetFamily:
    return SubsetFamily(
        {"content": 32, "user": 64, "item": 64},
        {
            "content": ["content"],
            "user": ["content", "user"],
            "item": ["content", "item"],
            "all": ["content", "user", "item"],
        },
    )


def _chain(length: int) -> SubsetFamily:
    groups = {f"g{n}": 1 for n in range(length)}
    names = list(groups)
    return SubsetFamily(groups, {f"first {k}": names[:k] for k in range(1, length + 1)})


def _powerset(count: int) -> SubsetFamily:
    return SubsetFamily.powerset({f"g{n}": 1 for n in range(count)})


def _singles_and_pairs(count: int) -> SubsetFamily:
    groups = {f"g{n}": 1 for n in range(count)}
    chosen = [c for size in (1, 2) for c in itertools.combinations(groups, size)]
    return SubsetFamily(groups, {"+".join(c): c for c in chosen})


#: Name to family. The benchmark measures layers as ``family.hidden_layout(d, d)``.
FAMILIES: dict[str, Callable[[], SubsetFamily]] = {
    "toy3": lambda: SubsetFamily.powerset({"x1": 1, "x2": 1}),
    "ncf4": _ncf4,
    "spotify8": lambda: skip_sessions()[0],
    "chain16": lambda: _chain(16),
    "powerset4": lambda: _powerset(4),
    "powerset6": lambda: _powerset(6),
    "powerset8": lambda: _powerset(8),
    "pairs22": lambda: _singles_and_pairs(22),
}


def family_named(name: str) -> SubsetFamily:
    """One of ``FAMILIES``, or ``powersetN``: all subsets of N groups, from 1 to 8.

    Raises:
        LayoutError: Another name; the message lists the known ones.
    """
    if name in FAMILIES:
        return FAMILIES[name]()
    count = name.removeprefix("powerset")
    if count == name or not (count.isascii() and count.isdigit()):
        raise LayoutError(
            f"unknown family {name!r}; known are {', '.join(FAMILIES)} and powersetN with N from 1 "
            "to 8. Your own has two subsets or more, such as: a b a+b"
        )
    if not 1 <= int(count) <= 8:
        raise LayoutError(f"powersetN draws 1 to 8 groups, got {int(count)}")
    return _powerset(int(count))
