"""Interleaved rounds of every contender on one case, in one process.

Machines are shared and noisy, so only ratios within one process count. A round takes one sample of
every contender and phase, in a new random order; reported are the median over rounds and the
quartiles. A sample of a fast contender is several calls, so that it lasts a millisecond (on a GPU,
three).

On a GPU there are three modes. *Hot* calls use the same inputs again and again. *Cold* calls use
many inputs in turn, so that each has left the cache before it is used again. *Graph* replays a CUDA
graph, unless results are huge.
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
from bench.cases import Case
from bench.clock import Clock, HostClock, cache_bytes, clock_of
from bench.contender import Contender, Layer, Unavailable
from bench.counts import count
from bench.layers.limits import Settings, case_unsupported_reason, unsupported_reason
from bench.layers.ratios import COLD, GRAPH, HOT, RECORDED
from bench.layers.reference_error import error_limit, errors, reference, rows_to_check
from bench.layers.replay import MOST_VALUES, Replayed
from bench.precision import products
from bench.problem import Problem
from bench.statistics import quartiles

SAMPLE = HostClock.least  # seconds of a sample
#: Seconds; only shorter calls depend on the data that the previous contender left in the caches.
LONGEST_AHEAD = 20e-3
MOST_CALLS = 1000  # in one sample
MOST_ROUNDS = 100
FEW = 2  # samples of a contender that is ``Settings.slow`` times slower than the best
LONG_CALL = 1.0  # seconds; one call this long is enough warm-up
HELD = 8e9  # bytes that autograd graphs may hold until their backward is timed


@dataclass
class Runner:
    """Samples of one contender in one phase, in seconds a call.

    Attributes:
        mode: ``HOT``, ``COLD`` or ``GRAPH``.
        into: The record that takes its report.
        times_slower: How many times slower than the best it was in the warm-up.
        slow: The limit of ``times_slower`` beyond which it gets few samples.
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
        """Fill caches, start threads, compile; and estimate how long a call takes."""
        self.first = self.estimate = self.sample()
        if self.first < LONG_CALL or self.contender.compiled:
            self.estimate = self.sample()
        self.calls = self._calls()
        if self._clock.asynchronous and self.calls > 1:  # one call alone is mostly its launch
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
        """Seconds a call; autograd graphs for the backward are made before the clock starts.

        The same number of calls runs untimed first, so that the caches hold the data of this
        contender and not of the previous one; except in cold mode, and for long calls.
        """
        try:
            if self.mode != COLD and 0 < self.estimate < LONGEST_AHEAD:
                self._calls_to_time()()
            return self._clock.seconds(self._calls_to_time()) / self.calls
        finally:
            self.contender.problem.select(0)

    def _calls_to_time(self) -> Callable[[], None]:
        contender, calls = self.contender, range(self.calls)
        select = contender.problem.select if self.mode == COLD else _keep
        if self.phase == "backward":
            graphs = []
            for k in calls:
                select(k)
                graphs.append(contender.graph())

            def run() -> None:
                for k, graph in enumerate(graphs):
                    select(k)
                    contender.backward(graph)
        else:
            call = contender.forward if self.phase == "forward" else contender.step

            def run() -> None:
                for k in calls:
                    select(k)
                    call()

        return run

    def report(self) -> dict[str, Any]:
        """Microseconds a call: median and quartiles, and the number of samples and calls."""
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
        contenders: Ours and the others; ``None``: all for this device.

    Raises:
        Unavailable: The case as a whole exceeds the limits of the settings.
    """
    if case.dtype == "tf32" and torch.device(settings.device).type != "cuda":
        raise Unavailable("tf32 is a mode of a GPU's matrix units")
    contenders = rivals.contenders(settings.device) if contenders is None else contenders
    with products(tf32=case.dtype == "tf32"):
        try:
            return _measure(case, settings, gflops, contenders)
        finally:
            if torch.device(settings.device).type == "cuda":
                gc.collect()  # CUDA graphs hold memory pools
                torch.cuda.empty_cache()


def _measure(
    case: Case, settings: Settings, gflops: float, contenders: Sequence[type[Contender]]
) -> dict[str, Any]:
    problem = Problem.of(case, settings.device)
    reason = case_unsupported_reason(problem, settings, gflops)
    if reason is not None:
        raise Unavailable(reason)
    if settings.compile:
        torch._dynamo.reset()  # torch limits recompilations, and counts those of the last case
    problem.make_sets(cache_bytes(problem.device))
    rows = rows_to_check(problem)
    expected = reference(problem, rows)
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
            reason = unsupported_reason(kind, problem, settings, gflops)
            if reason is not None:
                raise Unavailable(reason)
            contender = kind(problem)
            record["error"] = _checked(contender, expected, rows)
            ready = _warm(contender, HOT, record)
            if len(problem.sets) > 1 and kind.rotates:
                ready += _warm(contender, COLD, record)
        except Exception as error:  # a contender that cannot run is recorded with its reason
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
    """Runners of every phase in one mode, warmed up; ``record`` takes their reports."""
    into = record.setdefault(RECORDED[mode], {})
    runners = [Runner(contender, phase, mode, into) for phase in contender.phases]
    for runner in runners:
        runner.warm_up()
    return runners


def _replayed(contender: Contender, record: dict[str, Any]) -> list[Runner]:
    """Runners of its CUDA graph, unless that holds gigabytes; if it fails, ``record`` says why."""
    if not replays(contender.problem):
        return []
    try:
        return _warm(Replayed(contender), GRAPH, record)
    except Exception as error:  # a host sync in a rival, say
        record.pop(RECORDED[GRAPH], None)
        record["no_graph"] = _words(error)
        return []


def replays(problem: Problem) -> bool:
    """Are the contenders measured as CUDA graphs, too?"""
    values = problem.batch * problem.layout.out_features
    return problem.device.type == "cuda" and values <= MOST_VALUES


def _checked(contender: Contender, expected: dict[str, Tensor], rows: int) -> dict[str, float]:
    """Errors of its results; a floor has none.

    Raises:
        Unavailable: It claims to be exact and is not.
    """
    if not isinstance(contender, Layer):
        return {}
    found = errors(contender.results(rows), expected)
    limit = error_limit(contender.problem)
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


def _keep(k: int) -> None:
    """Keep the inputs, whatever the call."""


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
