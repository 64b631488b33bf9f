"""Ratios of a result: our time beside the best rival and the floor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bench.cases import Case
from bench.counts import PHASES

OURS = "ours"
#: Modes: inputs in the cache, inputs that have left it, a replayed CUDA graph.
HOT, COLD, GRAPH = "hot", "cold", "graph"
#: Mode to the key of a contender's record with its times; a CPU has the first one only.
RECORDED = {HOT: "phases", COLD: "cold", GRAPH: "graph"}
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Time:
    """Microseconds of a contender in a phase: median and quartiles."""

    name: str
    us: float
    q25: float
    q75: float


@dataclass(frozen=True)
class Line:
    """Our time in one phase of a case, and the times it is compared to.

    Attributes:
        case: The case.
        phase: One of ``PHASES``.
        ours: Our time.
        best: Fastest rival that computes the same function, forward and backward.
        any: Fastest rival of all, those with another gradient included.
        floor: The slower of the two floors, since both are lower bounds.
        flops: FLOPs that the phase needs.
        bytes: Bytes that the phase must move.
        mode: One of ``RECORDED``.
    """

    case: Case
    phase: str
    ours: Time
    best: Time | None
    any: Time | None
    floor: Time | None
    flops: int
    bytes: int
    mode: str = HOT

    @property
    def label(self) -> str:
        """Phase, and the mode unless it is hot."""
        return self.phase if self.mode == HOT else f"{self.phase}, {self.mode}"

    @property
    def speedup(self) -> float | None:
        """Time of the best exact rival / ours: above 1 we are faster."""
        return None if self.best is None else self.best.us / self.ours.us

    @property
    def speedup_any(self) -> float | None:
        """Time of the fastest rival of all / ours."""
        return None if self.any is None else self.any.us / self.ours.us

    @property
    def over_floor(self) -> float | None:
        """Our time / the floor: at 1 there is nothing left to gain."""
        return None if self.floor is None else self.ours.us / self.floor.us

    @property
    def gflops(self) -> float:
        """Rate of the FLOPs that the phase needs, GFLOP/s."""
        return self.flops / self.ours.us / 1e3

    @property
    def gbs(self) -> float:
        """Rate of the bytes that must move, GB/s."""
        return self.bytes / self.ours.us / 1e3

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes


def case_of(result: Result) -> Case:
    """The case a result belongs to."""
    return Case(result["family"], result["width"], result["batch"], result["dtype"])


def is_ours(name: str) -> bool:
    """Is this contender one of our backends, chosen or named?"""
    return name == OURS or name.startswith(f"{OURS}, ")


def times(result: Result, phase: str, mode: str = HOT) -> Iterator[tuple[Mapping[str, Any], Time]]:
    """Record and time of every contender that was measured in ``phase`` and ``mode``."""
    for name, record in result["contenders"].items():
        sample = record.get(RECORDED[mode], {}).get(phase)
        if sample is not None:
            yield record, Time(name, sample["us"], sample["q25"], sample["q75"])


def lines(result: Result, mode: str = HOT) -> list[Line]:
    """One line a phase in which ours was measured."""
    found = (line_of(result, phase, mode) for phase in PHASES)
    return [line for line in found if line is not None]


def modes_of(results: Iterable[Result]) -> list[str]:
    """The modes in which any contender was measured."""
    seen = {key for result in results for record in result["contenders"].values() for key in record}
    return [mode for mode, key in RECORDED.items() if key in seen]


def line_of(result: Result, phase: str, mode: str = HOT) -> Line | None:
    """Ours in ``phase`` and ``mode``; ``None`` where it was not measured."""
    measured = list(times(result, phase, mode))
    ours = next((time for _, time in measured if time.name == OURS), None)
    if ours is None:
        return None
    rivals = [(r, t) for r, t in measured if not is_ours(t.name) and not r["floor"]]
    counts = result["counts"][phase]
    return Line(
        case_of(result),
        phase,
        ours,
        _fastest(t for r, t in rivals if r["exact"]),
        _fastest(t for _, t in rivals),
        max((t for r, t in measured if r["floor"]), key=lambda t: t.us, default=None),
        counts["flops"],
        counts["bytes"],
        mode,
    )


def _fastest(found: Iterable[Time]) -> Time | None:
    return min(found, key=lambda time: time.us, default=None)
