"""Interleaved rounds of every contender on one case, in one process.

Machines are shared and noisy: a round takes one sample of every contender and phase, in a new
random order, and what is reported is the median over rounds with its quartiles. A sample of a fast
contender is several calls, so that it lasts a millisecond (on a GPU, three). Ratios within one
process are what counts.

On a GPU everybody is measured *hot*, on the same inputs over and over; *cold*, in turn on so many
that they have left the cache; and, few rows only, as a *graph* that was captured before.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench import rivals
from bench.clock import Clock, HostClock, cache_bytes, clock_of
from bench.layers.contender import Contender, Layer, Unavailable
from bench.layers.counts import count
from bench.layers.limits import Settings, case_obstacle, obstacle
from bench.layers.problem import Problem
from bench.layers.ratios import COLD, GRAPH, HOT, RECORDED, quartiles
from bench.layers.replay import MOST_ROWS, Replayed
from bench.layers.truth import errors, rows_to_check, truth, worst
from bench.precision import products
from bench.shapes import Case

SAMPLE = HostClock.least  # seconds of a sample
LONGEST_AHEAD = 20e-3  # seconds of a call beyond which who ran before does not show
MOST_CALLS = 1000  # in one sample
MOST_ROUNDS = 100
FEW = 2  # samples of who is ``Settings.slow`` times slower than the best
LONG_CALL = 1.0  # seconds beyond which the first call is warm-up enough
HELD = 8e9  # bytes that graphs may hold which wait for their backward


@dataclass
class Runner:
    """Samples of one contender in one phase, in seconds a call.

    Attributes:
        mode: ``HOT``, ``COLD`` or ``GRAPH``.
        into: Where its report belongs.
        times_slower: Than the best, in the warm-up.
        slow: Beyond this it gets few samples.
    """

    contender: Contender
    phase: str
    mode: str = HOT
    into: dict[str, Any] = field(default_factory=dict)
    calls: int = 1
    first: float = 0.0
    estimate: float = 0.0
    times_slower: float = 0.0
    slow: float = Settings.slow
    samples: list[float] = field(default_factory=list)

    def warm_up(self) -> None:
        """Plans, caches, threads, compilation; and how long a call takes."""
        self.first = self.estimate = self.sample()
        if self.first < LONG_CALL or self.contender.compiled:
            self.estimate = self.sample()
        self.calls = self._calls()
        if self._clock.lags and self.calls > 1:  # one call alone waited for its launch
            self.estimate = self.sample()
            self.calls = self._calls()

    @property
    def _clock(self) -> Clock:
        return clock_of(self.contender.problem.device)

    def _calls(self) -> int:
        most = MOST_CALLS
        if self.phase == "backward":
            most = min(most, int(HELD // max(self.contender.memory(self.contender.problem), 1)))
        return min(max(1, most), max(1, round(self._clock.least / self.estimate + 0.5)))

    def sample(self) -> float:
        """Seconds a call; graphs for the backward are made before the clock starts.

        As many calls go ahead of the clock, so that caches hold what this contender left and not
        what the one before it did. Not where they are to be cold, nor where a call is long.
        """
        try:
            if self.mode != COLD and 0 < self.estimate < LONGEST_AHEAD:
                self._calls_to_time()()
            return self._clock.seconds(self._calls_to_time()) / self.calls
        finally:
            self.contender.problem.turn(0)

    def _calls_to_time(self) -> Callable[[], None]:
        contender, calls = self.contender, range(self.calls)
        turn = contender.problem.turn if self.mode == COLD else _stay
        if self.phase == "backward":
            graphs = []
            for k in calls:
                turn(k)
                graphs.append(contender.graph())

            def run() -> None:
                for k, graph in enumerate(graphs):
                    turn(k)
                    contender.backward(graph)
        else:
            call = contender.forward if self.phase == "forward" else contender.step

            def run() -> None:
                for k in calls:
                    turn(k)
                    call()

        return run

    def report(self) -> dict[str, Any]:
        """Microseconds a call: median and quartiles, and what they were made from."""
        low, median, high = (1e6 * value for value in quartiles(self.samples))
        report: dict[str, Any] = {
            "us": median,
            "q25": low,
            "q75": high,
            "samples": len(self.samples),
            "calls": self.calls,
            "first_us": 1e6 * self.first,
        }
        if self.times_slower > self.slow:
            report["fewer"] = f"{self.times_slower:.0f}x slower than the best in the warm-up"
        return report


def measure(
    case: Case,
    settings: Settings,
    gflops: float,
    contenders: Sequence[type[Contender]] | None = None,
) -> dict[str, Any]:
    """Times, counts and errors of every contender on ``case``.

    Args:
        case: What to compute.
        settings: How to measure.
        gflops: This machine's measured GEMM rate in the case's dtype.
        contenders: Ours and the others; ``None`` means all there are for this device.

    Raises:
        Unavailable: The case as a whole is beyond the settings.
    """
    if case.dtype == "tf32" and torch.device(settings.device).type != "cuda":
        raise Unavailable("tf32 is a mode of a GPU's matrix units")
    contenders = rivals.contenders(settings.device) if contenders is None else contenders
    with products(tf32=case.dtype == "tf32"):
        try:
            return _measure(case, settings, gflops, contenders)
        finally:
            if torch.device(settings.device).type == "cuda":
                gc.collect()  # graphs hold pools of memory
                torch.cuda.empty_cache()


def _measure(
    case: Case, settings: Settings, gflops: float, contenders: Sequence[type[Contender]]
) -> dict[str, Any]:
    problem = Problem.of(case, settings.device)
    reason = case_obstacle(problem, settings, gflops)
    if reason is not None:
        raise Unavailable(reason)
    if settings.compile:
        torch._dynamo.reset()  # recompilations are limited, and the last case had its own
    problem.make_sets(cache_bytes(problem.device))
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
            ready = _warm(contender, HOT, record)
            if len(problem.sets) > 1 and kind.rotates:
                ready += _warm(contender, COLD, record)
        except Exception as error:  # what cannot run is reported with its reason, not dropped
            record["unavailable"] = _words(error)
            for mode in RECORDED.values():
                record.pop(mode, None)
        else:
            runners += ready + _replayed(contender, record)
    _run_rounds(runners, settings, case)
    for runner in runners:
        runner.into[runner.phase] = runner.report()
    return {
        **vars(case),
        "experts": len(problem.layout.row_sizes),
        "density": problem.layout.density,
        "counts": {phase: vars(counts) for phase, counts in count(problem).items()},
        "error_rows": rows,
        "sets": len(problem.sets),
        "contenders": records,
    }


def _warm(contender: Contender, mode: str, record: dict[str, Any]) -> list[Runner]:
    """Runners of every phase in one mode, warmed up; their reports go into ``record``."""
    into = record.setdefault(RECORDED[mode], {})
    runners = [Runner(contender, phase, mode, into) for phase in contender.phases]
    for runner in runners:
        runner.warm_up()
    return runners


def _replayed(contender: Contender, record: dict[str, Any]) -> list[Runner]:
    """The same as a CUDA graph, for few rows on a GPU; where that fails, ``record`` says why."""
    if not replays(contender.problem):
        return []
    try:
        return _warm(Replayed(contender), GRAPH, record)
    except Exception as error:  # a host sync in a rival, say
        record.pop(RECORDED[GRAPH], None)
        record["no_graph"] = _words(error)
        return []


def replays(problem: Problem) -> bool:
    """Is everybody measured as a CUDA graph, too?"""
    return problem.device.type == "cuda" and problem.batch <= MOST_ROWS


def _checked(contender: Contender, true: dict[str, Tensor], rows: int) -> dict[str, float]:
    """Errors of what it computes; a floor has none.

    Raises:
        Unavailable: It claims to be exact and is not.
    """
    if not isinstance(contender, Layer):
        return {}
    found = errors(contender.results(rows), true)
    limit = worst(contender.problem)
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
    for kind in {(runner.phase, runner.mode) for runner in runners}:
        same = [r for r in runners if (r.phase, r.mode) == kind]
        best = min((r.estimate for r in same if not r.contender.floor), default=float("inf"))
        for runner in same:
            runner.times_slower, runner.slow = runner.estimate / best, settings.slow
    order = random.Random(str(case))
    with _no_collection():
        end = time.perf_counter() + settings.budget
        for done in range(MOST_ROUNDS):
            if done >= settings.rounds and time.perf_counter() > end:
                break
            for runner in order.sample(runners, len(runners)):
                if done < FEW or runner.times_slower <= runner.slow:
                    runner.samples.append(runner.sample())


def _stay(k: int) -> None:
    """The inputs stay what they are."""


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
