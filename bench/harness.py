"""Interleaved rounds of every contender on one case, in one process.

Machines are shared and noisy: a round takes one sample of every contender and phase, in a new
random order, and what is reported is the median over rounds with its quartiles. A sample of a fast
contender is several calls, so that it lasts a millisecond. Ratios within one process are what
counts.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench import rivals
from bench.contender import Contender, Layer, Unavailable
from bench.counts import count
from bench.limits import Settings, case_obstacle, obstacle
from bench.problem import Problem
from bench.shapes import Case
from bench.truth import WORST, errors, rows_to_check, truth

SAMPLE = 1e-3  # least seconds of a sample
MOST_CALLS = 1000  # in one sample
MOST_ROUNDS = 100
SLOW, FEW = 30, 2  # this many times slower than the best: this many samples
LONG_CALL = 1.0  # seconds beyond which the first call is warm-up enough


@dataclass
class Runner:
    """Samples of one contender in one phase, in seconds a call."""

    contender: Contender
    phase: str
    calls: int = 1
    first: float = 0.0
    estimate: float = 0.0
    times_slower: float = 0.0
    samples: list[float] = field(default_factory=list)

    def warm_up(self) -> None:
        """Plans, caches, threads, compilation; and how long a call takes."""
        self.first = self.estimate = self.sample()
        if self.first < LONG_CALL or self.contender.compiled:
            self.estimate = self.sample()
        self.calls = min(MOST_CALLS, max(1, round(SAMPLE / self.estimate + 0.5)))

    def sample(self) -> float:
        """Seconds a call; graphs for the backward are made before the clock starts."""
        contender, calls = self.contender, range(self.calls)
        synchronize = _synchronize(contender.problem.device)
        if self.phase == "backward":
            graphs = [contender.graph() for _ in calls]
            synchronize()
            start = time.perf_counter()
            for graph in graphs:
                contender.backward(graph)
        else:
            call = contender.forward if self.phase == "forward" else contender.step
            synchronize()
            start = time.perf_counter()
            for _ in calls:
                call()
        synchronize()
        return (time.perf_counter() - start) / len(calls)

    def report(self) -> dict[str, Any]:
        """Microseconds a call: median and quartiles, and what they were made from."""
        low, median, high = (
            1e6 * value for value in statistics.quantiles(self.samples, n=4, method="inclusive")
        )
        report: dict[str, Any] = {
            "us": median,
            "q25": low,
            "q75": high,
            "samples": len(self.samples),
            "calls": self.calls,
            "first_us": 1e6 * self.first,
        }
        if self.times_slower > SLOW:
            report["fewer"] = f"{self.times_slower:.0f}x slower than the best in the warm-up"
        return report


def measure(
    case: Case,
    settings: Settings,
    gflops: float,
    contenders: Sequence[type[Contender]] = rivals.ALL,
) -> dict[str, Any]:
    """Times, counts and errors of every contender on ``case``.

    Args:
        case: What to compute.
        settings: How to measure.
        gflops: This machine's measured GEMM rate in the case's dtype.
        contenders: Ours and the others.

    Raises:
        Unavailable: The case as a whole is beyond the settings.
    """
    problem = Problem.of(case, settings.device)
    reason = case_obstacle(problem, settings, gflops)
    if reason is not None:
        raise Unavailable(reason)
    if settings.compile:
        torch._dynamo.reset()  # recompilations are limited, and the last case had its own
    rows = rows_to_check(problem)
    true = truth(problem, rows)
    records: dict[str, dict[str, Any]] = {}
    runners: list[Runner] = []
    for kind in contenders:
        record = records[kind.name] = {
            "number": kind.number,
            "note": kind.note,
            "exact": kind.exact,
            "floor": kind.floor,
        }
        try:
            reason = obstacle(kind, problem, settings, gflops)
            if reason is not None:
                raise Unavailable(reason)
            contender = kind(problem)
            record["error"] = _checked(contender, true, rows)
            ready = [Runner(contender, phase) for phase in kind.phases]
            for runner in ready:
                runner.warm_up()
        except Exception as error:  # what cannot run is reported with its reason, not dropped
            record["unavailable"] = _words(error)
        else:
            runners += ready
    _run_rounds(runners, settings, case)
    for runner in runners:
        phases = records[runner.contender.name].setdefault("phases", {})
        phases[runner.phase] = runner.report()
    return {
        **vars(case),
        "experts": len(problem.layout.row_sizes),
        "density": problem.layout.density,
        "counts": {phase: vars(counts) for phase, counts in count(problem).items()},
        "error_rows": rows,
        "contenders": records,
    }


def _checked(contender: Contender, true: dict[str, Tensor], rows: int) -> dict[str, float]:
    """Errors of what it computes; a floor has none.

    Raises:
        Unavailable: It claims to be exact and is not.
    """
    if not isinstance(contender, Layer):
        return {}
    found = errors(contender.results(rows), true)
    limit = WORST[contender.problem.dtype]
    wrong = {name: error for name, error in found.items() if not error <= limit}
    if contender.exact and wrong:
        name, error = max(wrong.items(), key=lambda pair: pair[1])
        raise Unavailable(f"wrong: {name} is off by {error:.1e} of its largest value")
    return found


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else text[:300] + " ..."
    return text if isinstance(error, Unavailable) else f"{type(error).__name__}: {text}"


def _run_rounds(runners: list[Runner], settings: Settings, case: Case) -> None:
    for phase in {runner.phase for runner in runners}:
        same = [r for r in runners if r.phase == phase]
        best = min((r.estimate for r in same if not r.contender.floor), default=float("inf"))
        for runner in same:
            runner.times_slower = runner.estimate / best
    order = random.Random(str(case))
    with _no_collection():
        end = time.perf_counter() + settings.budget
        for done in range(MOST_ROUNDS):
            if done >= settings.rounds and time.perf_counter() > end:
                break
            for runner in order.sample(runners, len(runners)):
                if done < FEW or runner.times_slower <= SLOW:
                    runner.samples.append(runner.sample())


def _synchronize(device: torch.device) -> Callable[[], None]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
