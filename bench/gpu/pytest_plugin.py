"""A pytest plugin of the GPU lab (``-p bench.gpu.pytest_plugin``): json lines for each test, and a watch.

One line as a test begins, one as it ends, into ``MASKMOE_LINES`` (where that takes none, into
``MASKMOE_SPARE``); ``MASKMOE_TASK`` names the process. ``MASKMOE_SHARD=2/8`` takes every eighth
test from the third on. What has begun in this task before is left out, so a process that a test has
ended goes on after it. A phase of a test that takes more than ``MASKMOE_TEST_SECONDS`` ends the
process, whatever it waits for: the watch is C, and needs no interpreter lock.
"""

from __future__ import annotations

import faulthandler
import os
import time

import pytest
import torch

from bench.device import LOST, is_lost
from bench.gpu.json_lines import append, read

#: The process's own, from before pytest puts a file in its place.
STDERR = os.dup(2)


def shard_of(text: str) -> tuple[int, int]:
    """``"2/8"``: the number of this shard, from 0, and how many there are."""
    number, _, count = text.partition("/")
    return int(number), int(count)


def begun(task: str) -> set[str]:
    """The tests that this task has begun already."""
    lines = read(os.environ["MASKMOE_LINES"], os.environ["MASKMOE_SPARE"])
    return {x["test"] for x in lines if x["event"] == "test begins" and x["task"] == task}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the other shards' tests to them, and those that have begun to their fate."""
    number, count = shard_of(os.environ.get("MASKMOE_SHARD", "0/1"))
    known = begun(_task())
    mine = [item for item in items[number::count] if item.nodeid not in known]
    others = [item for item in items if item not in set(mine)]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = mine


def pytest_runtest_logstart(nodeid: str) -> None:
    """What has no other line after this one ended its process."""
    _write("test begins", nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Set the watch; so do the next two."""
    faulthandler.dump_traceback_later(
        float(os.environ["MASKMOE_TEST_SECONDS"]), exit=True, file=STDERR
    )


pytest_runtest_call = pytest_runtest_teardown = pytest_runtest_setup


def pytest_runtest_logfinish() -> None:
    """Between tests nothing is watched."""
    faulthandler.cancel_dump_traceback_later()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line a test: of its call, or of the phase that kept it from being called."""
    if report.when != "call" and report.outcome == "passed":
        return
    more: dict[str, object] = {"outcome": report.outcome, "seconds": round(report.duration, 3)}
    if report.outcome == "failed":
        more["message"] = str(report.longrepr)[-1500:]
    elif report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        more["message"] = str(report.longrepr[2])
    _write("test", report.nodeid, **more)
    device = os.environ.get("MASKMOE_TEST_DEVICE", "cpu")
    if report.outcome == "failed" and torch.cuda.is_initialized() and is_lost(device):
        os._exit(LOST)  # no kernel runs in this process any more


def _task() -> str:
    return os.environ.get("MASKMOE_TASK", "")


def _write(event: str, test: str, **more: object) -> None:
    line = {"event": event, "task": _task(), "test": test, "at": round(time.time(), 2), **more}
    append(os.environ["MASKMOE_LINES"], line, os.environ["MASKMOE_SPARE"])
