"""``python -m bench.gpu.check prove`` (then ``measure``, ``tune``): the GPU lab, without a network.

Three commands of under four minutes each; see ``bench/README.md``. Everything is written as it
comes into ``--work``: ``lab.jsonl`` (a line for each process and test), logs, a json file after
each case. One json and one archive of all that lie in ``--out``, refreshed as processes end. So a
run that is cut off loses nothing, and a test that ends its process costs itself alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console

from bench import results
from bench.device import LOST
from bench.gpu.json_lines import append, read
from bench.gpu.parts import PARTS, ROOT, Lab, Part, Task
from bench.gpu.report import CUT_OFF, FAILED, PASSED, REFUSED, TAIL, bring, gathered, told

#: Seconds between two refreshed archives.
REFRESHED = 10.0
#: What a rehearsal plants, and what must become of it; all else must pass.
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
FAULTY = "faults"


@dataclass
class Running:
    """A process that was begun, and what it was.

    Attributes:
        said: The end of what it wrote; a thread reads on, so that a full disk is not its trouble.
    """

    task: Task
    tried: int
    process: subprocess.Popen[bytes]
    began: float
    log: Path
    said: bytearray = field(default_factory=bytearray)
    reader: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=self._listen, daemon=True)
        self.reader.start()

    def _listen(self) -> None:
        pipe: IO[bytes] = self.process.stdout  # type: ignore[assignment]
        while chunk := pipe.read(1 << 16):
            self.said += chunk
            del self.said[:-TAIL]
            with suppress(OSError), self.log.open("ab") as file:
                file.write(chunk)

    def over(self, begin: float) -> bool:
        """Has it used up its own seconds?"""
        now, task = time.perf_counter(), self.task
        return (task.seconds is not None and now - self.began > task.seconds) or (
            task.until is not None and now - begin > task.until
        )

    def end(self) -> None:
        """End the process with its own."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.reader.join(2)


def begin(task: Task, tried: int, lab: Lab) -> Running:
    """Start ``task`` in the checkout; its output goes into a file of its own."""
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
        process_group=0,  # of its own, but in our session: it ends with us at the latest
    )
    return Running(task, tried, process, time.perf_counter(), log)


def run(
    tasks: Sequence[Task],
    lab: Lab,
    slots: int,
    refresh: Callable[[dict[str, str]], None] = lambda outcomes: None,
) -> dict[str, str]:
    """All tasks, ``slots`` at once, within the lab's seconds: what became of each.

    Args:
        tasks: What to run, in this order.
        lab: Where, and for how long.
        slots: Processes at once.
        refresh: Called with the outcomes so far, now and then.
    """
    start = refreshed = time.perf_counter()
    waiting = [(task, 0) for task in tasks]
    running: list[Running] = []
    outcomes = dict.fromkeys((task.name for task in tasks), CUT_OFF)

    def settle(one: Running) -> None:
        outcome, again = _ended(one, lab)
        if outcomes[one.task.name] != FAILED:  # of several tries the worst counts
            outcomes[one.task.name] = outcome
        if again:
            waiting.insert(0, (one.task, one.tried + 1))

    try:
        while (waiting or running) and time.perf_counter() - start < lab.seconds:
            waiting = [w for w in waiting if not _too_late(w[0], start)]
            while waiting and len(running) < slots and _may_begin(waiting[0][0], running):
                running.append(begin(*waiting.pop(0), lab))
            for one in [*running]:
                if one.process.poll() is not None or one.over(start):
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


def _may_begin(task: Task, running: Sequence[Running]) -> bool:
    return not running or not (task.alone or running[0].task.alone)


def _too_late(task: Task, start: float) -> bool:
    return task.until is not None and time.perf_counter() - start > task.until


def _ended(one: Running, lab: Lab) -> tuple[str, bool]:
    """What became of a process, also as a line; whether it is to be begun again."""
    cut = one.process.poll() is None
    one.end()
    status = one.process.returncode
    outcome = CUT_OFF if cut else FAILED if status else PASSED
    said = one.said.decode("utf-8", "replace")
    if outcome == FAILED and any(text in said for text in one.task.refusals):
        outcome = REFUSED
    stopped = unfinished(read(lab.lines, lab.spare), one.task.name)
    line: dict[str, Any] = {
        "event": "process",
        "task": one.task.name,
        "command": one.task.line(),
        "outcome": outcome,
        "status": status,
        "seconds": round(time.perf_counter() - one.began, 2),
        "log": one.log.name,
        "said": said,
    }
    append(lab.lines, line, lab.spare)
    for test in stopped:
        end = {"event": "test", "task": one.task.name, "test": test, "outcome": CUT_OFF}
        if not cut:
            at = said.rfind("Timeout (")  # the watch says where the test was
            why = f"ended its process, status {status}" if at < 0 else "took too long"
            last = said[-1500:] if at < 0 else said[at : at + 1500]
            end |= {"outcome": FAILED, "message": f"{last}\n{why}"}
        append(lab.lines, end, lab.spare)
    lost = outcome == FAILED and (status == LOST or status < 0 or bool(stopped))
    return outcome, lost and one.tried + 1 < one.task.tries


def unfinished(lines: Sequence[dict[str, Any]], task: str) -> list[str]:
    """Tests of ``task`` that have begun and not ended."""
    mine = [x for x in lines if x.get("task") == task]
    ended = {x["test"] for x in mine if x["event"] == "test"}
    return [x["test"] for x in mine if x["event"] == "test begins" and x["test"] not in ended]


# --- The whole ---------------------------------------------------------------------------


def perform(name: str, part: Part, arguments: argparse.Namespace, console: Console) -> int:
    """One command; what it found lies in ``--out`` and stands on the screen.

    Returns:
        0; 1 where something failed; 2 where nothing failed but something was cut off.
    """
    rehearsal = arguments.dry_run
    work = (arguments.work or Path("build/gpu-rehearsal" if rehearsal else "runs/gpu")).resolve()
    lab = Lab(work / name, rehearsal, arguments.seconds or part.seconds)
    tasks = part.tasks(lab)
    if rehearsal:
        print_plan(part.tasks(Lab(lab.work, False, lab.seconds)), lab, console)
    if arguments.tasks:
        tasks = [task for task in tasks if task.name.split()[0] in arguments.tasks]
    shutil.rmtree(lab.work, ignore_errors=True)  # what a command left before is another's
    lab.work.mkdir(parents=True, exist_ok=True)
    append(lab.lines, {"event": "machine", **results.machine(lab.device)}, lab.spare)
    out = arguments.out or work
    refused: list[str] = []

    def refresh(outcomes: dict[str, str]) -> None:
        found = gathered(outcomes, read(lab.lines, lab.spare))
        refused[:] = bring(found, lab.work, out, name)

    try:
        outcomes = run(tasks, lab, part.slots, refresh)
        lines = read(lab.lines, lab.spare)
    finally:
        lab.spare.unlink(missing_ok=True)
    found = gathered(outcomes, lines)
    screen = [*told(found), *refused]
    if rehearsal:
        differ = differences(outcomes, lines)
        screen += differ or [f"{name} rehearsed: everything came back as planted"]
    for line in screen:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if rehearsal:
        return 1 if differ else 0
    if FAILED in outcomes.values() or found["red"]:
        return 1
    return 2 if CUT_OFF in outcomes.values() or found["cut off"] else 0


def differences(outcomes: Mapping[str, str], lines: Sequence[dict[str, Any]]) -> list[str]:
    """What did not become of a rehearsal's tasks and planted tests what had to."""
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


def print_plan(tasks: Sequence[Task], lab: Lab, console: Console) -> None:
    """Every task as it would be typed."""
    for task in tasks:
        line = f"{task.name}: {task.line()}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{len(tasks)} processes, {lab.seconds:.0f} s in all\n", highlight=False)


def main(words: Sequence[str], console: Console | None = None) -> int:
    """The command; see the module."""
    console = console or Console()
    parser = _parser()
    arguments = parser.parse_args(words)
    names = arguments.command or (list(PARTS) if arguments.dry_run else [])
    if not names:
        parser.error(f"which of {', '.join(PARTS)}?")
    if not arguments.dry_run and not torch.cuda.is_available():
        console.print("This torch sees no GPU. To rehearse without one: --dry-run", style="red")
        return 1
    return max(perform(name, PARTS[name], arguments, console) for name in names)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "command",
        nargs="*",
        choices=[*PARTS, []],
        metavar="COMMAND",
        help="; ".join(f"{name}: {part.text}" for name, part in PARTS.items()),
    )
    add("--tasks", nargs="+", metavar="NAME", help="only these (the first word of their names)")
    add(
        "--dry-run",
        action="store_true",
        help="print the plan and rehearse it on the CPU, with faults (default: all three)",
    )
    add("--out", type=Path, metavar="DIR", help="for the json and the archive; default: --work")
    add("--work", type=Path, metavar="DIR", help="for all that is written; default: runs/gpu")
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
