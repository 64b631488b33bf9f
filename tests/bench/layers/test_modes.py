"""Clocks, cold caches, CUDA graphs: the GPU's side of the harness, with stand-ins for a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from rich.console import Console

from bench.cases import Case
from bench.clock import EventClock, HostClock, cache_bytes, clock_of
from bench.contender import Unavailable
from bench.counts import PHASES
from bench.layers import harness, replay
from bench.layers.compare import changes
from bench.layers.harness import Runner, measure
from bench.layers.limits import Settings
from bench.layers.ratios import COLD, GRAPH, HOT, line_of, lines
from bench.layers.replay import Replayed
from bench.layers.suites import SUITES
from bench.layers.summary import print_summary, summarize
from bench.layers.tables import print_result
from bench.precision import products
from bench.problem import Problem
from bench.rivals.floor import FloorCopy, FloorGemm
from bench.rivals.grouped_mm import GroupedMMGathered
from bench.rivals.ours import Ours, OursTorch
from bench.rivals.paper_style import PaperStyle, PaperStyleReduceOverhead
from tests.bench.handmade import document

CASE = Case("toy3", 8, 16)
QUICK = Settings(rounds=2, budget=0.0, longest=10.0)
KINDS = [Ours, OursTorch, PaperStyle, GroupedMMGathered, FloorGemm, FloorCopy]
CPU = torch.device("cpu")


def replays(call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], Any], Any]:
    """What a CUDA graph does: the results' memory is written again."""
    results = call()

    def again() -> None:
        for old, new in zip(replay._tensors(results), replay._tensors(call()), strict=True):
            old.copy_(new)

    return again, results


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "cache_bytes", lambda device: 4096)
    monkeypatch.setattr(harness, "replays", lambda problem: True)
    monkeypatch.setattr(replay, "capture", replays)


@pytest.fixture
def measured(like_a_gpu: None) -> dict[str, Any]:
    return measure(CASE, QUICK, 1e6, KINDS)


def test_every_mode_is_measured(measured: dict[str, Any]) -> None:
    records = measured["contenders"]
    assert measured["sets"] == 6  # 16 rows of 24 floats, and 8192 bytes to pass
    for kind in KINDS:
        record = records[kind.name]
        assert tuple(record["phases"]) == PHASES
        assert ("cold" in record) == kind.rotates
        assert tuple(record["graph"]) == ("forward", "step")
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured


def test_ours_by_name_is_no_rival(measured: dict[str, Any]) -> None:
    for mode in (HOT, COLD, GRAPH):
        line = line_of(measured, "step", mode)
        assert line is not None
        assert line.best is not None
        assert line.best.name == "paper style"
        assert line.mode == mode
    assert [line.label for line in lines(measured, GRAPH)] == ["forward, graph", "step, graph"]


def test_modes_are_printed(measured: dict[str, Any]) -> None:
    console = Console(width=200)
    summary = summarize([measured])
    assert summary["modes"].keys() == {COLD, GRAPH}
    assert summary["modes"][COLD]["compared"] == 3
    assert summary["modes"][GRAPH]["compared"] == 2
    assert summary["modes"][GRAPH]["means"][0]["cases"] == 1  # few rows are what graphs are for
    with console.capture() as capture:
        print_result(measured, console)
        print_summary(summary, console)
    for word in ("step, cold", "forward, graph", "Cold: geometric", "Graph: geometric"):
        assert word in capture.get()


def test_modes_are_compared(measured: dict[str, Any]) -> None:
    run = document(measured)
    found = [change.old.label for change in changes(run, run)]
    assert found == [*PHASES, *(f"{p}, cold" for p in PHASES), "forward, graph", "step, graph"]


def test_a_cpu_has_one_mode() -> None:
    made = measure(CASE, QUICK, 1e6, [Ours])
    assert made["sets"] == 1
    assert made["contenders"]["ours"].keys().isdisjoint({"cold", "graph", "no_graph"})
    assert "modes" in summarize([made])
    assert summarize([made])["modes"] == {}


# --- Cold --------------------------------------------------------------------------------


def test_sets_pass_the_cache() -> None:
    problem = Problem.of(CASE)
    problem.make_sets(10_000)
    assert sum(x.nbytes for x, _ in problem.sets) >= 20_000
    assert sum(x.nbytes for x, _ in problem.sets[1:]) < 20_000
    assert len({x.data_ptr() for x, _ in problem.sets}) == len(problem.sets)
    large = Problem.of(CASE)
    large.make_sets(large.x.nbytes)
    assert len(large.sets) == 1  # it does not fit beside anything
    large.make_sets(large.x.nbytes + 1)
    assert len(large.sets) == 3


@pytest.mark.parametrize("phase", PHASES)
def test_cold_calls_take_turns(phase: str) -> None:
    """Each call has its own inputs; a backward the gradient of the inputs it saw."""
    problem = Problem.of(CASE)
    problem.make_sets(4096)
    seen: list[int] = []

    class Watched(Ours):
        def backward(self, graph: torch.Tensor) -> Any:
            grads = super().backward(graph)
            expected = torch.autograd.grad(self(problem.x), problem.x, problem.grad)
            assert torch.equal(grads[0], expected[0])
            seen.append(problem.position)
            return grads

        def forward(self) -> torch.Tensor:
            seen.append(problem.position)
            return super().forward()

    for mode, expected in ((COLD, [0, 1, 2, 3, 4, 5, 0]), (HOT, [0] * 7)):
        seen.clear()
        Runner(Watched(problem), phase, mode, calls=7).sample()
        assert seen == expected
        assert problem.position == 0


def test_floors_take_turns() -> None:
    problem = Problem.of(CASE)
    problem.make_sets(4096)
    gemm, copy = FloorGemm(problem), FloorCopy(problem)
    for make in (gemm.forward, copy.forward, copy.step):
        results = []
        for k in range(len(problem.sets)):
            problem.select(k)
            results.append(make().clone())
        assert len({tuple(r.flatten().tolist()) for r in results}) == len(problem.sets)


# --- Graphs ------------------------------------------------------------------------------


def test_a_graph_that_cannot_be_captured_has_a_reason(
    like_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(call: Any, device: torch.device) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replay, "capture", refuse)
    record = measure(CASE, QUICK, 1e6, [Ours])["contenders"]["ours"]
    assert record["no_graph"].startswith("RuntimeError: operation not permitted")
    assert "graph" not in record
    assert "phases" in record


@pytest.mark.usefixtures("like_a_gpu")
def test_a_graph_that_replays_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "capture", lambda call, device: (lambda: None, call()))
    with pytest.raises(Unavailable, match="off by nan"):
        Replayed(Ours(Problem.of(CASE)))


def test_graphs_of_their_own_are_not_captured() -> None:
    class Own(PaperStyle):
        capturable = PaperStyleReduceOverhead.capturable
        name = "own"

    with pytest.raises(Unavailable, match="own makes CUDA graphs itself"):
        Replayed(Own(Problem.of(CASE)))


def test_on_a_gpu_what_is_not_huge_is_replayed() -> None:
    problem = Problem.of(CASE)
    assert not harness.replays(problem)
    problem.device = torch.device("cuda")
    assert harness.replays(problem)
    problem.batch = 1 << 26
    assert not harness.replays(problem)


# --- Clocks and precision ----------------------------------------------------------------


class Event:
    """``torch.cuda.Event`` in the time of a made-up stream."""

    now = 0.0
    log: list[str] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now
        Event.log.append("record")

    def synchronize(self) -> None:
        Event.log.append("wait")

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


def test_events_surround_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> None:
        Event.log.append("run")
        Event.now += 0.25

    Event.log.clear()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: Event.log.append("synchronize"))
    assert EventClock(torch.device("cuda")).seconds(run) == pytest.approx(0.25)
    assert Event.log == ["synchronize", "record", "run", "record", "wait"]


def test_a_device_has_its_clock() -> None:
    assert isinstance(clock_of(CPU), HostClock)
    assert isinstance(clock_of(torch.device("cuda:1")), EventClock)
    assert cache_bytes(CPU) == 0


def test_an_asynchronous_device_is_measured_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call alone is mostly its launch: what many take is what counts."""

    class Asynchronous(HostClock):
        asynchronous = True

    monkeypatch.setattr(harness, "clock_of", lambda device: Asynchronous())
    monkeypatch.setattr(Runner, "sample", lambda self: 2e-4 if self.calls == 1 else 2e-5)
    runner = Runner(Ours(Problem.of(CASE)), "forward")
    runner.warm_up()
    assert runner.estimate == 2e-5
    assert runner.calls == pytest.approx(Asynchronous.least / 2e-5, abs=1)


def test_waiting_graphs_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "HELD", 7 * Ours.memory(Problem.of(CASE)))
    monkeypatch.setattr(Runner, "sample", lambda self: 1e-6)
    runners = [Runner(Ours(Problem.of(CASE)), phase) for phase in ("backward", "step")]
    for runner in runners:
        runner.warm_up()
    assert [runner.calls for runner in runners] == [7, harness.MOST_CALLS]


def test_precision_is_what_it_was() -> None:
    before = torch.get_float32_matmul_precision()
    for tf32, name in ((True, "medium"), (False, "highest")):
        with products(tf32):
            assert torch.get_float32_matmul_precision() == name
        assert torch.get_float32_matmul_precision() == before


def test_tf32_is_a_gpus() -> None:
    with pytest.raises(Unavailable, match="GPU's matrix units"):
        measure(Case("toy3", 8, 16, "tf32"), QUICK, 1e6, [Ours])
    assert Problem.of(Case("toy3", 8, 16, "tf32")).dtype == torch.float32


def test_suites_of_a_gpu() -> None:
    whole = set(SUITES["gpu"].cases())
    assert {case.batch for case in whole} == {256, 4096, 65536, 1048576}
    assert {case.dtype for case in whole} == {"float32", "tf32", "bfloat16", "float16"}
    quick = SUITES["gpu-quick"].cases()
    assert set(quick) <= whole
    # By priority: large batches in 16 bits and TF32, then fewer rows and float32.
    first, rest = quick[:16], quick[16:]
    assert {case.batch for case in first} == {65536, 1048576}
    assert {case.dtype for case in first} == {"bfloat16", "tf32", "float16"}
    assert {case.width for case in first} == {16, 32, 64, 128}
    assert {case.batch for case in rest} >= {256, 4096}
    assert {case.dtype for case in rest} == {"bfloat16", "float32"}
    for name in ("smoke", "quick", "full"):
        assert {case.dtype for case in SUITES[name].cases()} <= {"float32", "bfloat16"}
