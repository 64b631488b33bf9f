"""A rehearsal of the GPU lab on the CPU, with planted faults: what has to come back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.gpu.report import FAILED, PASSED

#: The tests of ``tests/bench/gpu/faults.py`` and their outcomes. All other tasks must pass.
PLANTED = {
    "test_green_before": PASSED,
    "test_fails": FAILED,
    "test_hangs": FAILED,
    "test_crashes": FAILED,
    "test_slow_property": FAILED,
    "test_slow_property_was_cut_short": PASSED,
    "test_fills_the_disk": FAILED,
    "test_green_after": PASSED,
}
#: The task that runs them.
FAULTY = "faults"


def differences(outcomes: Mapping[str, str], lines: Sequence[dict[str, Any]]) -> list[str]:
    """Tasks and planted tests of a rehearsal whose outcome differs from the expected one."""
    tests = [x for x in lines if x["event"] == "test" and x["task"] == FAULTY]
    found = {x["test"].rpartition("::")[2]: x["outcome"] for x in tests}
    planted = {name: outcome for name, outcome in PLANTED.items() if FAULTY in outcomes}
    expected = dict.fromkeys(outcomes, PASSED) | ({FAULTY: FAILED} if planted else {})
    wrong = [
        f"{name}: {outcome}, not {expected[name]}"
        for name, outcome in outcomes.items()
        if outcome != expected[name]
    ]
    wrong += [
        f"{name}: {found.get(name, 'lost')}, not {outcome}"
        for name, outcome in planted.items()
        if found.get(name) != outcome
    ]
    return wrong
