"""Limits of a run, and the reason why a case or a contender exceeds them."""

from __future__ import annotations

from dataclasses import dataclass

from bench.contender import Contender
from bench.counts import count
from bench.problem import Problem


@dataclass(frozen=True)
class Settings:
    """How to measure a case.

    Attributes:
        rounds: Minimum number of rounds.
        budget: Seconds; after these no round begins beyond the minimum.
        longest: Seconds that a phase may take at the measured GEMM rate.
        memory: Bytes that a contender may take, with what all contenders share.
        compile: Whether to measure the compiled variants.
        device: Where to measure.
        slow: A contender this many times slower than the best gets only two samples.
    """

    rounds: int
    budget: float
    longest: float
    memory: float = 12e9
    compile: bool = False
    device: str = "cpu"
    slow: float = 30.0


def case_unsupported_reason(problem: Problem, settings: Settings, gflops: float) -> str | None:
    """Why the case as a whole is not measured; ``None`` if it is."""
    return _too_long(count(problem)["step"].flops, settings, gflops) or _too_large(
        Contender.memory(problem), problem, settings
    )


def unsupported_reason(
    kind: type[Contender], problem: Problem, settings: Settings, gflops: float
) -> str | None:
    """Why a contender is not measured; ``None`` if it is.

    Args:
        kind: The contender.
        problem: What it would compute.
        settings: The limits.
        gflops: Peak rate of torch's own product in this dtype.
    """
    if kind.compiled and not settings.compile:
        return "compiles for tens of seconds: measured with --compile"
    return _too_long(kind.flops(problem), settings, gflops) or _too_large(
        kind.memory(problem), problem, settings
    )


def _too_long(flops: int, settings: Settings, gflops: float) -> str | None:
    seconds = flops / gflops / 1e9
    if seconds <= settings.longest:
        return None
    return (
        f"would take {seconds:.1f} s at the {gflops:.0f} GFLOP/s of torch's own GEMM; the limit is "
        f"{settings.longest:g} s (--longest)"
    )


def _too_large(own_bytes: int, problem: Problem, settings: Settings) -> str | None:
    layout = problem.layout
    rows = problem.batch * (layout.in_features + layout.out_features)
    shared = (2 * layout.num_weights + rows) * problem.dtype.itemsize
    # Positions of the packed weights are int64, and finding them takes a dense mask.
    shared += 24 * layout.num_weights + layout.in_features * layout.out_features
    need, limit = (shared + own_bytes) / 1e9, settings.memory / 1e9
    if need <= limit:
        return None
    return f"needs about {need:.1f} GB; the limit is {limit:.1f} GB (--memory)"
