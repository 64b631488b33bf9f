"""Rounds, samples, limits, and what becomes of contenders that fail."""

from __future__ import annotations

import gc
import json
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import rivals
from bench.cases import Case
from bench.contender import Contender, Unavailable
from bench.counts import PHASES
from bench.layers.harness import FEW, LONGEST_AHEAD, MOST_CALLS, SAMPLE, Runner, measure
from bench.layers.limits import Settings
from bench.problem import Problem
from bench.rivals.best_dense import BestDense
from bench.rivals.floor import FloorGemm
from bench.rivals.masked_dense import MaskedDense
from bench.rivals.ours import Ours
from bench.rivals.paper_style import PaperStyle

CASE = Case("toy3", 8, 16)
QUICK = Settings(rounds=3, budget=0.0, longest=10.0)
FAST = 1e6  # GFLOP/s: nothing takes long


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return measure(CASE, QUICK, FAST)


def test_every_contender_is_measured_or_has_a_reason(measured: dict[str, Any]) -> None:
    assert list(measured["contenders"]) == [kind.name for kind in rivals.ALL]
    for kind in rivals.ALL:
        record = measured["contenders"][kind.name]
        assert ("phases" in record) != ("unavailable" in record)
        if "phases" in record:
            assert tuple(record["phases"]) == kind.phases
            assert record["exact"] is kind.exact
    for name in ("ours", "paper style", "best dense", "bucketed bmm", "floor gemm", "floor copy"):
        assert "phases" in measured["contenders"][name]
    for kind in rivals.ALL:
        if kind.compiled:
            assert "--compile" in measured["contenders"][kind.name]["unavailable"]


def test_a_result_is_json(measured: dict[str, Any]) -> None:
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured


def test_samples_quartiles_and_errors(measured: dict[str, Any]) -> None:
    for record in measured["contenders"].values():
        for sample in record.get("phases", {}).values():
            assert 0 < sample["q25"] <= sample["us"] <= sample["q75"]
            assert sample["samples"] == 3 or "fewer" in sample
        if "phases" in record and record["exact"] and not record["floor"]:
            assert record["error"].keys() == {"y", "grad_x", "grad_weight", "grad_bias"}
            assert max(record["error"].values()) < 1e-5
    assert measured["contenders"]["masked dense"]["error"]["grad_x"] > 0.1
    assert measured["error_rows"] == CASE.batch


def test_fast_contenders_are_called_several_times_a_sample(
    measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [s for r in measured["contenders"].values() for s in r.get("phases", {}).values()]
    assert max(sample["calls"] for sample in samples) > 10
    for seconds, calls in ((SAMPLE / 20, 20), (SAMPLE / 2.5, 3), (2 * SAMPLE, 1), (1e-9, 1000)):
        monkeypatch.setattr(Runner, "sample", lambda self, seconds=seconds: seconds)
        runner = Runner(scripted("fast")(Problem.of(CASE)), "forward")
        runner.warm_up()
        assert abs(runner.calls - calls) <= 1
        assert runner.calls * seconds >= SAMPLE or calls == MOST_CALLS


class Time:
    """Stands for the module: time passes by sleeping, and a little whenever someone asks."""

    now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-7
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


time = Time()


@pytest.fixture
def scripted_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lasts how long is scripted, not a matter of who else is on the machine."""
    monkeypatch.setattr("bench.clock.time", time)
    monkeypatch.setattr("bench.layers.harness.time", time)


class Scripted(Contender):
    """A contender that sleeps, and notes who was called."""

    name = "scripted"
    floor = True  # nothing to check against the reference
    seconds = 0.002
    preparation = 0.0
    called: list[str]

    def _do(self, phase: str) -> None:
        type(self).called.append(phase)
        time.sleep(self.seconds)

    def forward(self) -> None:
        self._do("forward")

    def graph(self) -> None:
        time.sleep(self.preparation)

    def backward(self, graph: Any) -> None:
        self._do("backward")

    def step(self) -> None:
        self._do("step")


def scripted(name: str, **attributes: Any) -> type[Scripted]:
    return type(name, (Scripted,), {"name": name, "called": [], **attributes})


@pytest.mark.usefixtures("scripted_time")
def test_the_graph_is_made_before_the_clock_starts() -> None:
    kind = scripted("graph", seconds=0.0, preparation=0.02, phases=("backward",))
    found = measure(CASE, QUICK, FAST, [kind])["contenders"]["graph"]
    assert found["phases"]["backward"]["us"] < 5000


def test_what_is_reported_is_the_median() -> None:
    runner = Runner(scripted("one")(Problem.of(CASE)), "forward", first=7e-6)
    runner.samples = [100e-6, 1e-6, 8e-6, 2e-6, 4e-6]
    report = runner.report()
    found = [report[name] for name in ("q25", "us", "q75", "first_us")]
    assert found == pytest.approx([2, 4, 8, 7])
    assert (report["samples"], report["calls"]) == (5, 1)
    assert "fewer" not in report


@pytest.mark.usefixtures("scripted_time")
def test_rounds_are_interleaved() -> None:
    log: list[str] = []
    kinds = [
        scripted(name, called=log, phases=(phase,), _do=lambda self, phase: log.append(self.name))
        for name, phase in (("a", "forward"), ("b", "step"))
    ]
    for kind in kinds:
        kind._do = lambda self, phase: (log.append(self.name), time.sleep(SAMPLE))[0]
    settings = Settings(rounds=6, budget=0.0, longest=10.0)
    measure(CASE, settings, FAST, kinds)
    ahead, rounds = log[-24::2], log[-23::2]  # what is before is warm-up
    assert ahead == rounds
    assert all(set(rounds[k : k + 2]) == {"a", "b"} for k in range(0, 12, 2))


@pytest.mark.usefixtures("scripted_time")
@pytest.mark.parametrize(
    ("seconds", "slower"),
    [(SAMPLE, 1.0), (SAMPLE / 4, 1.0), (2 * LONGEST_AHEAD, 3.0)],
)
def test_short_calls_do_not_depend_on_the_contender_before_them(
    seconds: float, slower: float
) -> None:
    """The first call after someone else's takes three times as long as those after it."""
    log = [""]

    def call(self: Scripted, phase: str) -> None:
        time.sleep(seconds * (1 if log[-1] == self.name else 3))
        log.append(self.name)

    kinds = [scripted(name, phases=("step",), _do=call) for name in "ab"]
    found = measure(CASE, Settings(rounds=40, budget=0.0, longest=10.0), FAST, kinds)["contenders"]
    for name in "ab":
        slowest = found[name]["phases"]["step"]["q75"] / 1e6
        assert slowest == pytest.approx(slower * seconds, rel=0.01)


@pytest.mark.usefixtures("scripted_time")
def test_rounds_go_on_within_the_budget() -> None:
    kind = scripted("one", seconds=0.002, phases=("forward",))
    settings = Settings(rounds=2, budget=0.2, longest=10.0)
    found = measure(CASE, settings, FAST, [kind])["contenders"]["one"]
    assert 10 < found["phases"]["forward"]["samples"] <= 100


@pytest.mark.usefixtures("scripted_time")
def test_slow_contenders_get_few_samples() -> None:
    fast = scripted("fast", seconds=0.0, floor=False)
    slow = scripted("slow", seconds=0.05, floor=False)
    found = measure(CASE, QUICK, FAST, [fast, slow])["contenders"]
    for phase in PHASES:
        assert found["fast"]["phases"][phase]["samples"] == 3
        assert found["slow"]["phases"][phase]["samples"] == FEW
        assert "x slower than the best" in found["slow"]["phases"][phase]["fewer"]
        assert "fewer" not in found["fast"]["phases"][phase]
    patient = Settings(rounds=3, budget=0.0, longest=10.0, slow=1e9)
    found = measure(CASE, patient, FAST, [fast, slow])["contenders"]
    assert {found["slow"]["phases"][phase]["samples"] for phase in PHASES} == {3}


def test_the_collector_works_again_afterwards() -> None:
    assert gc.isenabled()
    measure(CASE, QUICK, FAST, [scripted("one", phases=("forward",))])
    assert gc.isenabled()


# --- Failures ----------------------------------------------------------------------------


class Broken(PaperStyle):
    name = "broken"

    def backward(self, graph: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("no kernel\nfor this")


class Wrong(BestDense):
    name = "wrong"
    factor = 1.01

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * self.factor


class NotANumber(Wrong):
    name = "not a number"
    factor = float("nan")


def test_failures_are_recorded_with_their_reason() -> None:
    kinds = [Ours, Broken, Wrong, NotANumber, FloorGemm]
    found = measure(CASE, QUICK, FAST, kinds)["contenders"]
    assert "phases" in found["ours"]
    assert found["broken"]["unavailable"] == "RuntimeError: no kernel for this"
    assert found["wrong"]["unavailable"].startswith("wrong: ")
    assert found["not a number"]["unavailable"].startswith("wrong: ")
    for name in ("broken", "wrong", "not a number"):
        assert "phases" not in found[name]


def test_a_dtype_without_kernels_is_recorded() -> None:
    found = measure(Case("toy3", 8, 16, "bfloat16"), QUICK, FAST)["contenders"]
    assert "phases" in found["ours"]
    assert found["ours"]["error"]["y"] > 1e-4  # it is bfloat16
    if not torch.cuda.is_available():
        assert "BFloat16" in found["BSR"]["unavailable"]


# --- Limits ------------------------------------------------------------------------------


def test_a_case_beyond_the_limits_is_left_out() -> None:
    case = Case("powerset4", 16, 64)
    with pytest.raises(Unavailable, match="--memory"):
        measure(case, Settings(3, 0.0, 10.0, memory=1e4), FAST)
    with pytest.raises(Unavailable, match=r"at the 1 GFLOP/s of .* limit is 1e-05 s \(--longest\)"):
        measure(case, Settings(3, 0.0, 1e-5), 1.0)


def test_only_the_dense_rivals_are_left_out() -> None:
    case = Case("powerset4", 16, 64)  # 240 by 240, 29 percent of it present
    memory = Settings(2, 0.0, 10.0, memory=1.1e6)
    found = measure(case, memory, FAST, [Ours, MaskedDense])["contenders"]
    assert "phases" in found["ours"]
    assert "--memory" in found["masked dense"]["unavailable"]
    # A step of ours is 5.3 MFLOP, of the masked product 22.
    longest = Settings(2, 0.0, longest=0.01)
    found = measure(case, longest, 1.0, [Ours, MaskedDense])["contenders"]
    assert "phases" in found["ours"]
    assert "--longest" in found["masked dense"]["unavailable"]


def test_names_are_unique() -> None:
    assert max(Counter(kind.name for kind in rivals.ALL).values()) == 1
