"""A pytest plugin of the GPU lab (``-p bench.gpu_lines``): a json line for each test as it ends.

``MASKMOE_LINES`` names the file, ``MASKMOE_PART`` the part of the lab; ``MASKMOE_SHARD=2/8`` takes
every eighth test from the third on.
"""

from __future__ import annotations

import os

import pytest

from bench.gpu_log import append


def shard_of(text: str) -> tuple[int, int]:
    """``"2/8"``: the number of this shard, from 0, and how many there are."""
    number, _, count = text.partition("/")
    return int(number), int(count)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the other shards' tests to them."""
    number, count = shard_of(os.environ.get("MASKMOE_SHARD", "0/1"))
    others = [item for k, item in enumerate(items) if k % count != number]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = items[number::count]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line a test: of its call, or of the phase that kept it from being called."""
    if report.when != "call" and report.outcome == "passed":
        return
    line = {
        "event": "test",
        "part": os.environ.get("MASKMOE_PART", ""),
        "test": report.nodeid,
        "outcome": report.outcome,
        "seconds": round(report.duration, 3),
    }
    if report.outcome == "failed":
        line["message"] = str(report.longrepr)[-1500:]
    elif report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        line["message"] = str(report.longrepr[2])
    append(os.environ["MASKMOE_LINES"], line)
