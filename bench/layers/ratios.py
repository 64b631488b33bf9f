"""Reading a result: the best rival, the floor, and where we stand between them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.layers.counts import PHASES
from bench.shapes import Case

OURS = "ours"
#: Modes: inputs in the cache, inputs that have left it, a CUDA graph captured beforehand.
HOT, COLD, GRAPH = "hot", "cold", "graph"
#: Where a contender's record holds the times of a mode; a CPU has the first one only.
RECORDED = {HOT: "phases", COLD: "cold", GRAPH: "graph"}
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Time:
    """Microseconds of a contender in a phase, median and quartiles."""

    name: str
    us: float
    q25: float
    q75: float


@dataclass(frozen=True)
class Line:
    """Ours in one phase of a case, with what it is compared to.

    Attributes:
        case: The case.
        phase: One of ``PHASES``.
        ours: Our time.
        best: Fastest rival that computes the same function, forward and backward.
        any: Fastest rival of all, whatever it computes backward.
        floor: The slower of the floors: nobody can be faster than either.
        flops: That must be done.
        bytes: That must move.
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
        """Phase and, unless it is hot, mode."""
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
        """Our time / the floor: 1 is the end of the road."""
        return None if self.floor is None else self.ours.us / self.floor.us

    @property
    def gflops(self) -> float:
        """Rate over the FLOPs that must be done, GFLOP/s."""
        return self.flops / self.ours.us / 1e3

    @property
    def gbs(self) -> float:
        """Rate over the bytes that must move, GB/s."""
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
    """Every contender that was measured in ``phase`` and ``mode``, with its record."""
    for name, record in result["contenders"].items():
        sample = record.get(RECORDED[mode], {}).get(phase)
        if sample is not None:
            yield record, Time(name, sample["us"], sample["q25"], sample["q75"])


def lines(result: Result, mode: str = HOT) -> list[Line]:
    """One line a phase; none where ours was not measured."""
    found = (line_of(result, phase, mode) for phase in PHASES)
    return [line for line in found if line is not None]


def modes_of(results: Iterable[Result]) -> list[str]:
    """The modes that anybody was measured in."""
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


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, between samples where they fall there.

    Of one sample, all three are that one.
    """
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, median, high


def geometric_mean(values: Iterable[float]) -> float | None:
    """``None`` of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None
