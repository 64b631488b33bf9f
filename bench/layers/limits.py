"""What is not measured, and why: too long, too large, not asked for."""

from __future__ import annotations

from dataclasses import dataclass

from bench.layers.contender import Contender
from bench.layers.counts import count
from bench.layers.problem import Problem
from bench.rivals.ours import Ours


@dataclass(frozen=True)
class Settings:
    """How to measure a case.

    Attributes:
        rounds: Least rounds.
        budget: Seconds of rounds after which none is begun beyond the least.
        longest: Seconds a phase may take at the measured GEMM rate; what needs more is left out.
        memory: Bytes a contender may take, with what all share.
        compile: Whether to measure the compiled variants.
        device: Where.
        slow: This many times slower than the best: two samples are enough.
    """

    rounds: int
    budget: float
    longest: float
    memory: float = 12e9
    compile: bool = False
    device: str = "cpu"
    slow: float = 30.0


def case_obstacle(problem: Problem, settings: Settings, gflops: float) -> str | None:
    """Why the case as a whole is left out; ``None`` where it is not."""
    return _too_long(count(problem)["step"].flops, settings, gflops) or _too_large(
        Ours.memory(problem), problem, settings
    )


def obstacle(
    kind: type[Contender], problem: Problem, settings: Settings, gflops: float
) -> str | None:
    """Why a contender is left out; ``None`` where it is not.

    Args:
        kind: The contender.
        problem: What it would compute.
        settings: Limits.
        gflops: Rate of torch's own product in this dtype, large and square.
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


def _too_large(bytes_of_its_own: int, problem: Problem, settings: Settings) -> str | None:
    layout = problem.layout
    rows = problem.batch * (layout.in_features + layout.out_features)
    shared = (2 * layout.num_weights + rows) * problem.dtype.itemsize
    # Positions of the packed weights are int64, and a dense mask is made to find them.
    shared += 24 * layout.num_weights + layout.in_features * layout.out_features
    need, limit = (shared + bytes_of_its_own) / 1e9, settings.memory / 1e9
    if need <= limit:
        return None
    return f"needs about {need:.1f} GB; the limit is {limit:.1f} GB (--memory)"
