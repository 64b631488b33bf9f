"""The families everybody is measured on."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from maskmoe_kernels import SubsetFamily


def _singles_and_pairs(count: int) -> SubsetFamily:
    groups = {f"g{n}": 1 for n in range(count)}
    chosen = [c for size in (1, 2) for c in itertools.combinations(groups, size)]
    return SubsetFamily(groups, {"+".join(c): c for c in chosen})


def _chain(length: int) -> SubsetFamily:
    groups = {f"g{n}": 1 for n in range(length)}
    names = list(groups)
    return SubsetFamily(groups, {f"first {k}": names[:k] for k in range(1, length + 1)})


def _powerset(count: int) -> SubsetFamily:
    return SubsetFamily.powerset({f"g{n}": 1 for n in range(count)})


def _toy3() -> SubsetFamily:
    return SubsetFamily.powerset({"x1": 1, "x2": 1})


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


def _spotify8() -> SubsetFamily:
    groups = {"position": 2, "context": 13, "interaction": 29, "popularity": 3, "music": 26}
    parts = [
        ["context"],
        ["interaction"],
        ["popularity"],
        ["music"],
        ["context", "interaction"],
        ["popularity", "music"],
        ["context", "interaction", "popularity"],
        ["context", "interaction", "popularity", "music"],
    ]
    return SubsetFamily(groups, {"+".join(p): ["position", *p] for p in parts})


#: Name to family; layers are measured as ``family.hidden_layout(d, d)``.
FAMILIES: dict[str, Callable[[], SubsetFamily]] = {
    "toy3": _toy3,
    "ncf4": _ncf4,
    "spotify8": _spotify8,
    "powerset4": lambda: _powerset(4),
    "powerset6": lambda: _powerset(6),
    "powerset8": lambda: _powerset(8),
    "pairs22": lambda: _singles_and_pairs(22),
    "chain16": lambda: _chain(16),
}
