"""Processes of the GPU lab: many at once, each with its own time limit and log."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from bench.device import LOST
from bench.gpu.json_lines import append, read
from bench.gpu.report import CUT_OFF, FAILED, PASSED, REFUSED, TAIL
from bench.gpu.tasks import ROOT, Lab, Task

#: Seconds between two refreshed archives.
REFRESHED = 10.0


@dataclass
class Running:
    """A process that has started.

    Attributes:
        output: The last bytes that it wrote. A thread reads them, so that a full disk does not
            block the process.
    """

    task: Task
    tried: int
    process: subprocess.Popen[bytes]
    start: float
    log: Path
    output: bytearray = field(default_factory=bytearray)
    reader: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=self._listen, daemon=True)
        self.reader.start()

    def _listen(self) -> None:
        pipe: IO[bytes] = self.process.stdout  # type: ignore[assignment]
        while chunk := pipe.read(1 << 16):
            self.output += chunk
            del self.output[:-TAIL]
            with suppress(OSError), self.log.open("ab") as file:
                file.write(chunk)

    def over(self, lab_start: float) -> bool:
        """Has it exceeded its own time limit?"""
        now, task = time.perf_counter(), self.task
        return (task.seconds is not None and now - self.start > task.seconds) or (
            task.until is not None and now - lab_start > task.until
        )

    def end(self) -> None:
        """Kill the process and its children."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.reader.join(2)


def start(task: Task, tried: int, lab: Lab) -> Running:
    """Start ``task`` in the checkout, with a log file of its own."""
    log = lab.work / "logs" / f"{task.name.replace(' ', '-').replace('/', '-of-')}.log"
    with suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = {
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "MASKMOE_LINES": str(lab.lines),
        "MASKMOE_SPARE": str(lab.spare),
        "MASKMOE_TASK": task.name,
        **task.variables,
    }
    process = subprocess.Popen(
        [*task.words, *(task.again if tried else ())],
        cwd=ROOT,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        process_group=0,  # to kill it with its children; in our session, so it ends with us
    )
    return Running(task, tried, process, time.perf_counter(), log)


def run(
    tasks: Sequence[Task],
    lab: Lab,
    slots: int,
    refresh: Callable[[dict[str, str]], None] = lambda outcomes: None,
) -> dict[str, str]:
    """Run all tasks within the time limit of the lab, and return the outcome of each.

    Args:
        tasks: In this order.
        lab: Folder and time limit.
        slots: Number of processes that run at once.
        refresh: Called with the outcomes so far, every few seconds.
    """
    begin = refreshed = time.perf_counter()
    waiting = [(task, 0) for task in tasks]
    running: list[Running] = []
    outcomes = dict.fromkeys((task.name for task in tasks), CUT_OFF)

    def settle(one: Running) -> None:
        outcome, again = _ended(one, lab)
        if outcomes[one.task.name] != FAILED:  # of several tries, the worst counts
            outcomes[one.task.name] = outcome
        if again:
            waiting.insert(0, (one.task, one.tried + 1))

    try:
        while (waiting or running) and time.perf_counter() - begin < lab.seconds:
            waiting = [w for w in waiting if not _too_late(w[0], begin)]
            while waiting and len(running) < slots and _may_start(waiting[0][0], running):
                running.append(start(*waiting.pop(0), lab))
            for one in [*running]:
                if one.process.poll() is not None or one.over(begin):
                    running.remove(one)
                    settle(one)
            if time.perf_counter() - refreshed > REFRESHED:
                refresh(outcomes)
                refreshed = time.perf_counter()
            time.sleep(0.05)
    finally:
        for one in running:
            settle(one)
        refresh(outcomes)
    return outcomes


def _may_start(task: Task, running: Sequence[Running]) -> bool:
    return not running or not (task.alone or running[0].task.alone)


def _too_late(task: Task, begin: float) -> bool:
    return task.until is not None and time.perf_counter() - begin > task.until


def _ended(one: Running, lab: Lab) -> tuple[str, bool]:
    """The outcome of a process, which is also written as a line; and whether to start it again."""
    cut = one.process.poll() is None
    one.end()
    status = one.process.returncode
    outcome = CUT_OFF if cut else FAILED if status else PASSED
    output = one.output.decode("utf-8", "replace")
    if outcome == FAILED and any(text in output for text in one.task.refusals):
        outcome = REFUSED
    stopped = unfinished(read(lab.lines, lab.spare), one.task.name)
    line: dict[str, Any] = {
        "event": "process",
        "task": one.task.name,
        "command": one.task.line(),
        "outcome": outcome,
        "status": status,
        "seconds": round(time.perf_counter() - one.start, 2),
        "log": one.log.name,
        "output": output,
    }
    append(lab.lines, line, lab.spare)
    for test in stopped:
        end = {"event": "test", "task": one.task.name, "test": test, "outcome": CUT_OFF}
        if not cut:
            at = output.rfind("Timeout (")  # faulthandler writes where the test hangs
            why = f"ended its process, status {status}" if at < 0 else "took too long"
            last = output[-1500:] if at < 0 else output[at : at + 1500]
            end |= {"outcome": FAILED, "message": f"{last}\n{why}"}
        append(lab.lines, end, lab.spare)
    lost = outcome == FAILED and (status == LOST or status < 0 or bool(stopped))
    return outcome, lost and one.tried + 1 < one.task.tries


def unfinished(lines: Sequence[dict[str, Any]], task: str) -> list[str]:
    """Tests of ``task`` that started and did not end."""
    mine = [x for x in lines if x.get("task") == task]
    ended = {x["test"] for x in mine if x["event"] == "test"}
    return [x["test"] for x in mine if x["event"] == "test begins" and x["test"] not in ended]
