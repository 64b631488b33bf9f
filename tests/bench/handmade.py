"""Results made by hand, and contenders that behave as a test needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.cases import Case
from bench.counts import PHASES

FLOPS, BYTES = 4_000_000, 1_000_000


def result(
    case: Case, times: Mapping[str, float], spread: float = 0.02, scale: float = 1.0
) -> dict[str, Any]:
    """What the harness reports: microseconds of contenders by name, alike in every phase.

    Args:
        case: Of the result.
        times: ``ours``, ``exact ...``, ``inexact ...`` and ``floor ...``.
        spread: Of the quartiles around the median, relative.
        scale: Of all times: how busy the machine was.
    """
    contenders = {}
    for name, us in times.items():
        sample = {
            "us": scale * us,
            "q25": scale * us * (1 - spread),
            "q75": scale * us * (1 + spread),
            "samples": 5,
            "calls": 1,
            "first_us": 2 * us,
        }
        contenders[name] = {
            "number": "",
            "note": "",
            "exact": not name.startswith("inexact"),
            "floor": name.startswith("floor"),
            "error": {} if name.startswith("floor") else {"y": 1e-7},
            "phases": dict.fromkeys(PHASES, sample),
        }
    return {
        **vars(case),
        "experts": 4,
        "density": 0.5,
        "counts": {phase: {"flops": FLOPS, "bytes": BYTES} for phase in PHASES},
        "error_rows": case.batch,
        "contenders": contenders,
    }


def document(*results: dict[str, Any], cpu: str = "a") -> dict[str, Any]:
    """A whole run."""
    return {
        "format": 2,
        "machine": {"cpu": cpu, "cores": 2, "threads": 1, "torch": "2", "device": "cpu"},
        "settings": {"suite": "quick"},
        "peak_rates": {name: {"gflops": 100.0, "gbs": 10.0} for name in ("float32", "bfloat16")},
        "results": list(results),
        "skipped": {},
        "summary": {},
    }
