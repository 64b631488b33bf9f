"""A pytest plugin of the GPU lab (``-p bench.gpu.pytest_plugin``): json lines, and a timeout.

A line when a test starts and one when it ends go into ``MASKMOE_LINES``, or into ``MASKMOE_SPARE``
where that file cannot be written; ``MASKMOE_TASK`` names the process. ``MASKMOE_SHARD=2/8`` runs
every eighth test from the third on. Tests that this task has started before are left out: a process
that a test has ended continues with the next one. A phase of a test that takes more than
``MASKMOE_TEST_SECONDS`` ends the process, even if it holds the interpreter lock: the timeout is
faulthandler's, which is written in C.
"""

from __future__ import annotations

import faulthandler
import os
import time

import pytest
import torch

from bench.device import LOST, is_lost
from bench.gpu.json_lines import append, read

#: stderr of the process; pytest replaces file descriptor 2.
STDERR = os.dup(2)


def shard_of(text: str) -> tuple[int, int]:
    """``"2/8"``: the index of this shard and the number of shards."""
    number, _, count = text.partition("/")
    return int(number), int(count)


def started(task: str) -> set[str]:
    """The tests that this task has started before."""
    lines = read(os.environ["MASKMOE_LINES"], os.environ["MASKMOE_SPARE"])
    return {x["test"] for x in lines if x["event"] == "test begins" and x["task"] == task}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of other shards, and those that have started before."""
    number, count = shard_of(os.environ.get("MASKMOE_SHARD", "0/1"))
    known = started(_task())
    mine = [item for item in items[number::count] if item.nodeid not in known]
    others = [item for item in items if item not in set(mine)]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = mine


def pytest_runtest_logstart(nodeid: str) -> None:
    """A test without a later line ended its process."""
    _write("test begins", nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Start the timeout, for each of the three phases."""
    faulthandler.dump_traceback_later(
        float(os.environ["MASKMOE_TEST_SECONDS"]), exit=True, file=STDERR
    )


pytest_runtest_call = pytest_runtest_teardown = pytest_runtest_setup


def pytest_runtest_logfinish() -> None:
    """Cancel the timeout between tests."""
    faulthandler.cancel_dump_traceback_later()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line a test: of its call, or of the phase that failed or skipped before it."""
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
        os._exit(LOST)  # this process can run no more kernels


def _task() -> str:
    return os.environ.get("MASKMOE_TASK", "")


def _write(event: str, test: str, **more: object) -> None:
    line = {"event": event, "task": _task(), "test": test, "at": round(time.time(), 2), **more}
    append(os.environ["MASKMOE_LINES"], line, os.environ["MASKMOE_SPARE"])
