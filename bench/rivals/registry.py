"""The list of contenders, to which each class adds itself."""

from __future__ import annotations

from typing import TypeVar

from bench.contender import Contender

REGISTERED: list[type[Contender]] = []
Kind = TypeVar("Kind", bound=type[Contender])


def register(kind: Kind) -> Kind:
    """Add a contender to the benchmark; a class decorator."""
    REGISTERED.append(kind)
    return kind
