"""``python -m bench.gpu_check prove`` (then ``measure``): the GPU lab, without a network.

Two commands of under four minutes; see ``bench/README.md``. Everything is written as it comes into
``--out``: ``lab.jsonl`` (a line for each process and test), logs, ``bench/bench.json`` after each
case. So a run that is cut off loses nothing, and a test that ends its process costs itself alone.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import results
from bench.command import LOST
from bench.gpu_log import append, read
from bench.gpu_parts import PARTS, ROOT, Lab, Task

LINES = "lab.jsonl"
PASSED, FAILED, CUT_OFF, REFUSED = "passed", "failed", "cut off", "refused"
#: Failures that are printed in full; all are in ``lab.jsonl``.
MOST_SHOWN = 40


@dataclass
class Running:
    """A process that was begun, and what it was."""

    task: Task
    tried: int
    process: subprocess.Popen[bytes]
    began: float
    log: Path

    def over(self) -> bool:
        """Has it used up its own seconds?"""
        limit = self.task.seconds
        return limit is not None and time.perf_counter() - self.began > limit

    def end(self) -> None:
        """End the process with its own."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def begin(task: Task, tried: int, lab: Lab) -> Running:
    """Start ``task`` in the checkout, its output in a file of its own."""
    log = lab.out / "logs" / f"{task.name.replace(' ', '-').replace('/', '-of-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = {
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "MASKMOE_LINES": str(lab.out / LINES),
        "MASKMOE_TASK": task.name,
        **task.variables,
    }
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*task.words, *(task.again if tried else ())],
            cwd=ROOT,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,  # of its own, but in our session: it ends with us at the latest
        )
    return Running(task, tried, process, time.perf_counter(), log)


def run(tasks: Sequence[Task], lab: Lab, slots: int) -> dict[str, str]:
    """All tasks, ``slots`` at once, within the lab's seconds: what became of each."""
    end = time.perf_counter() + lab.seconds
    waiting = [(task, 0) for task in tasks]
    running: list[Running] = []
    outcomes = dict.fromkeys((task.name for task in tasks), CUT_OFF)
    try:
        while (waiting or running) and time.perf_counter() < end:
            while waiting and len(running) < slots and _may_begin(waiting[0][0], running):
                running.append(begin(*waiting.pop(0), lab))
            for one in [*running]:
                if one.process.poll() is None and not one.over():
                    continue
                running.remove(one)
                outcome, again = _ended(one, lab)
                if outcomes[one.task.name] != FAILED:  # of several tries the worst counts
                    outcomes[one.task.name] = outcome
                if again:
                    waiting.insert(0, (one.task, one.tried + 1))
            time.sleep(0.05)
    finally:
        for one in running:
            _ended(one, lab)
    return outcomes


def _may_begin(task: Task, running: Sequence[Running]) -> bool:
    return not running or not (task.alone or running[0].task.alone)


def _ended(one: Running, lab: Lab) -> tuple[str, bool]:
    """What became of a process, also as a line; whether it is to be begun again."""
    cut = one.process.poll() is None
    one.end()
    status = one.process.returncode
    outcome = CUT_OFF if cut else FAILED if status else PASSED
    tail = one.log.read_text(encoding="utf-8", errors="replace")[-1500:]
    if outcome == FAILED and any(text in tail for text in one.task.refusals):
        outcome = REFUSED
    stopped = unfinished(read(lab.out / LINES), one.task.name)
    line: dict[str, Any] = {
        "event": "process",
        "task": one.task.name,
        "command": one.task.line(),
        "outcome": outcome,
        "status": status,
        "seconds": round(time.perf_counter() - one.began, 2),
        "log": one.log.name,
    }
    if outcome in (FAILED, REFUSED):
        line["message"] = tail
    append(lab.out / LINES, line)
    for test in stopped:
        end = {"event": "test", "task": one.task.name, "test": test, "outcome": CUT_OFF}
        if not cut:
            end |= {"outcome": FAILED, "message": f"ended its process, status {status}:\n{tail}"}
        append(lab.out / LINES, end)
    lost = outcome == FAILED and (status == LOST or status < 0 or bool(stopped))
    return outcome, lost and one.tried + 1 < one.task.tries


def unfinished(lines: Sequence[dict[str, Any]], task: str) -> list[str]:
    """Tests of ``task`` that have begun and not ended."""
    mine = [x for x in lines if x.get("task") == task]
    ended = {x["test"] for x in mine if x["event"] == "test"}
    return [x["test"] for x in mine if x["event"] == "test begins" and x["test"] not in ended]


# --- The whole ---------------------------------------------------------------------------


def summary(outcomes: dict[str, str], lab: Lab, console: Console) -> int:
    """Failures, then a line for each task; the exit status.

    Returns:
        0; 1 where something failed; 2 where nothing failed but something was cut off.
    """
    lines = read(lab.out / LINES)
    tests = [x for x in lines if x["event"] == "test"]
    bad = [x for x in tests if x["outcome"] == FAILED]
    for x in bad[:MOST_SHOWN]:
        last = str(x.get("message", "")).strip().splitlines()[-1:]
        text = f"FAILED [{x['task']}] {x['test']}: {' '.join(last)[:200]}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if len(bad) > MOST_SHOWN:
        console.print(f"and {len(bad) - MOST_SHOWN} more failures", highlight=False)
    table = Table()
    for column in ("task", "outcome", "seconds", "tests"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for name, outcome in outcomes.items():
        counts = Counter(x["outcome"] for x in tests if x["task"] == name)
        seconds = sum(x["seconds"] for x in lines if x["event"] == "process" and x["task"] == name)
        told = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
        table.add_row(name, outcome, f"{seconds:.0f}", told)
    console.print(table)
    found = [*outcomes.values(), *(x["outcome"] for x in tests)]
    return 1 if FAILED in found else 2 if CUT_OFF in found else 0


def print_plan(tasks: Sequence[Task], lab: Lab, console: Console) -> None:
    """Every task as it would be typed."""
    for task in tasks:
        line = f"{task.name}: {task.line()}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{len(tasks)} processes, {lab.seconds:.0f} s in all\n", highlight=False)


def main(words: Sequence[str], console: Console | None = None) -> int:
    """The command; see the module."""
    console = console or Console()
    arguments = _parser().parse_args(words)
    part = PARTS[arguments.command]
    out = arguments.out or Path("build/gpu-rehearsal" if arguments.dry_run else "runs/gpu")
    lab = Lab(out.resolve(), arguments.dry_run, arguments.seconds or part.seconds)
    tasks = part.tasks(lab)
    if arguments.dry_run:
        print_plan(part.tasks(Lab(lab.out, False, lab.seconds)), lab, console)
    elif not torch.cuda.is_available():
        console.print("This torch sees no GPU. To rehearse without one: --dry-run", style="red")
        return 1
    if arguments.tasks:
        tasks = [task for task in tasks if task.name.split()[0] in arguments.tasks]
    lab.out.mkdir(parents=True, exist_ok=True)
    (lab.out / LINES).unlink(missing_ok=True)
    append(lab.out / LINES, {"event": "machine", **results.machine(lab.device)})
    return summary(run(tasks, lab, part.slots), lab, console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("command", choices=PARTS, help="; ".join(f"{k}: {p.text}" for k, p in PARTS.items()))
    add("--tasks", nargs="+", metavar="NAME", help="only these (the first word of their names)")
    add("--dry-run", action="store_true", help="print the plan and rehearse it on the CPU")
    add("--out", type=Path, metavar="DIR", help="default: runs/gpu")
    add("--seconds", type=_seconds, metavar="S", help="of the whole command (default: its own)")
    return parser


def _seconds(text: str) -> float:
    value = float(text) if text.replace(".", "", 1).isdigit() else 0.0
    if not 0 < value < 1e5:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value


if __name__ == "__main__":
    # Cut off from outside: the processes it began end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main(sys.argv[1:]))
