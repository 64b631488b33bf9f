"""For people who use pytest-benchmark: ``pytest bench --benchmark-only``.

Groups are cases and phases. The harness behind ``python -m bench`` measures more contenders, in
interleaved rounds, with errors and floors; prefer it for a claim.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import Case
from bench.contender import Contender
from bench.problem import Problem
from bench.rivals.best_dense import BestDense
from bench.rivals.bucketed_bmm import BucketedBmm
from bench.rivals.masked_dense import MaskedDense
from bench.rivals.ours import Ours
from bench.rivals.paper_style import PaperStyle

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

CASES = (
    Case("ncf4", 64, 256),
    Case("ncf4", 64, 4096),
    Case("powerset4", 32, 4096),
    Case("powerset6", 16, 4096),
    Case("pairs22", 16, 256),
)
CONTENDERS = (Ours, PaperStyle, MaskedDense, BestDense, BucketedBmm)


@pytest.fixture(scope="module", params=CASES, ids=str)
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem.of(request.param)


@pytest.mark.parametrize("phase", ["forward", "step"])
@pytest.mark.parametrize("kind", CONTENDERS, ids=lambda kind: kind.name)
def test_contender(kind: type[Contender], phase: str, problem: Problem, benchmark: Any) -> None:
    case = benchmark.params["problem"]
    benchmark.group = f"{case} {phase}"
    contender = kind(problem)
    benchmark(contender.forward if phase == "forward" else contender.step)
