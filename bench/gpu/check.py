"""The GPU lab, for a machine without a network: ``python -m bench.gpu.check prove``.

Three commands of under four minutes each: ``prove``, ``measure``, ``tune``; see
``bench/README.md``. Results are written to ``--work`` as they come: ``lab.jsonl`` (a line for each
process and test), logs, and a json file after each case. A json file and an archive of all of it in
``--out`` are refreshed while processes run. So a run that is cut off loses nothing, and a test that
crashes its process costs only itself.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from bench.gpu.commands import COMMANDS, Command
from bench.gpu.json_lines import append, read
from bench.gpu.processes import run
from bench.gpu.rehearsal import differences
from bench.gpu.report import CUT_OFF, FAILED, screen_lines, summarize, write
from bench.gpu.tasks import Lab, Task
from bench.machine import machine


def perform(name: str, command: Command, arguments: argparse.Namespace, console: Console) -> int:
    """Run one command; write its results into ``--out`` and print them.

    Returns:
        0; 1 where something failed; 2 where nothing failed but something was cut off.
    """
    rehearsal = arguments.dry_run
    work = (arguments.work or Path("build/gpu-rehearsal" if rehearsal else "runs/gpu")).resolve()
    lab = Lab(work / name, rehearsal, arguments.seconds or command.seconds)
    tasks = command.tasks(lab)
    if rehearsal:
        print_tasks(command.tasks(Lab(lab.work, False, lab.seconds)), lab, console)
    if arguments.tasks:
        tasks = [task for task in tasks if task.name.split()[0] in arguments.tasks]
    shutil.rmtree(lab.work, ignore_errors=True)  # of an earlier run
    lab.work.mkdir(parents=True, exist_ok=True)
    append(lab.lines, {"event": "machine", **machine(lab.device)}, lab.spare)
    out = arguments.out or work
    unwritten: list[str] = []

    def refresh(outcomes: dict[str, str]) -> None:
        found = summarize(outcomes, read(lab.lines, lab.spare))
        unwritten[:] = write(found, lab.work, out, name)

    try:
        outcomes = run(tasks, lab, command.slots, refresh)
        lines = read(lab.lines, lab.spare)
    finally:
        lab.spare.unlink(missing_ok=True)
    found = summarize(outcomes, lines)
    screen = [*screen_lines(found), *unwritten]
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


def print_tasks(tasks: Sequence[Task], lab: Lab, console: Console) -> None:
    """Print every task as it would be typed."""
    for task in tasks:
        line = f"{task.name}: {task.line()}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{len(tasks)} processes, {lab.seconds:.0f} s in all\n", highlight=False)


def main(words: Sequence[str], console: Console | None = None) -> int:
    """Run the named commands; see the module."""
    console = console or Console()
    parser = _parser()
    arguments = parser.parse_args(words)
    names = arguments.command or (list(COMMANDS) if arguments.dry_run else [])
    if not names:
        parser.error(f"which of {', '.join(COMMANDS)}?")
    if not arguments.dry_run and not torch.cuda.is_available():
        console.print("This torch sees no GPU. To rehearse without one: --dry-run", style="red")
        return 1
    return max(perform(name, COMMANDS[name], arguments, console) for name in names)


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
        choices=[*COMMANDS, []],
        metavar="COMMAND",
        help="; ".join(f"{name}: {command.text}" for name, command in COMMANDS.items()),
    )
    add("--tasks", nargs="+", metavar="NAME", help="only these (the first word of their names)")
    add(
        "--dry-run",
        action="store_true",
        help="print the tasks and rehearse them on the CPU, with faults (default: all three)",
    )
    add("--out", type=Path, metavar="DIR", help="for the json and the archive; default: --work")
    add("--work", type=Path, metavar="DIR", help="for all files; default: runs/gpu")
    add("--seconds", type=_seconds, metavar="S", help="time limit of a command (default: its own)")
    return parser


def _seconds(text: str) -> float:
    value = float(text) if text.replace(".", "", 1).isdigit() else 0.0
    if not 0 < value < 1e5:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value


if __name__ == "__main__":
    # If it is ended from outside, its processes end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main(sys.argv[1:]))
