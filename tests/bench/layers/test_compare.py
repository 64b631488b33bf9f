"""Two runs: what counts as slower, and what is noise."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from bench.cases import Case
from bench.layers.compare import changes, missing, print_comparison
from tests.bench.handmade import document, result

CASE = Case("ncf4", 16, 4096)
TIMES = {"ours": 100.0, "exact": 200.0, "floor": 50.0}


def compared(
    new: dict[str, float], *, threshold: float = 1.1, cpu: str = "a", **how: Any
) -> tuple[bool, str]:
    """Whether something is slower, and the tables."""
    console = Console(width=200)
    first, second = document(result(CASE, TIMES)), document(result(CASE, new, **how), cpu=cpu)
    with console.capture() as capture:
        slower = print_comparison(first, second, threshold, console)
    return slower, capture.get()


def test_ratios() -> None:
    new = result(CASE, {"ours": 150.0, "exact": 220.0, "floor": 60.0})
    change = changes(document(result(CASE, TIMES)), document(new))[0]
    assert change.raw == pytest.approx(1.5)
    assert change.to_floor == pytest.approx(1.5 / 1.2)
    assert change.to_best == pytest.approx(1.5 / 1.1)


def test_slower_and_faster() -> None:
    slower, printed = compared(TIMES | {"ours": 130.0})
    assert slower
    assert "Ours is slower" in printed
    assert "1.30" in printed
    slower, printed = compared(TIMES | {"ours": 70.0})
    assert not slower
    assert "Ours is faster" in printed
    assert compared(TIMES)[0] is False


@pytest.mark.parametrize(
    "new",
    [
        {"ours": 105.0, "exact": 200.0, "floor": 50.0},  # within the threshold
        {"ours": 150.0, "exact": 300.0, "floor": 75.0},  # the machine was busy
        {"ours": 150.0, "exact": 300.0, "floor": 50.0},  # the rivals were slower as well
        {"ours": 100.0, "exact": 100.0, "floor": 25.0},  # only the others were faster
    ],
)
def test_what_is_not_slower(new: dict[str, float]) -> None:
    slower, printed = compared(new)
    assert not slower
    assert "Nothing is slower by more than 1.1x" in printed


def test_the_threshold_is_the_users() -> None:
    assert compared(TIMES | {"ours": 130.0}, threshold=1.4)[0] is False
    assert compared(TIMES | {"ours": 108.0}, threshold=1.05)[0] is True


def test_overlapping_quartiles_are_noise() -> None:
    assert compared(TIMES | {"ours": 130.0}, spread=0.3)[0] is False


def test_other_machines_are_compared_by_ratios_alone() -> None:
    slower, printed = compared(TIMES, cpu="b", scale=3.0)
    assert not slower
    assert "the machines differ" in printed
    assert "cpu: a / b" in printed
    # Twice as fast a machine, on which we lost half of our lead.
    slower, _ = compared({"ours": 100.0, "exact": 100.0, "floor": 25.0}, cpu="b")
    assert slower


def test_cases_of_one_run_only() -> None:
    other = Case("toy3", 16, 256)
    a, b = document(result(CASE, TIMES)), document(result(other, TIMES))
    assert missing(a, b) == ([str(CASE)], [str(other)])
    console = Console(width=200)
    with console.capture() as capture:
        assert print_comparison(a, b, 1.1, console) is False
    assert f"only in the first: {CASE}" in capture.get()
    assert "0 phases" in capture.get()
