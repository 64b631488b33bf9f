"""``python -m bench.gpu_check``: the GPU lab, in under nine minutes and without a network.

Tests on the GPU, then the benchmark; see ``bench/README.md``. Everything is written as it comes
into ``--out``: ``lab.jsonl`` (a line a command and a test), logs, ``bench/bench.json`` after each
case. So a run that is cut off loses nothing.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import results
from bench.command import LOST
from bench.gpu_log import append, read
from bench.gpu_parts import PARTS, ROOT, Command, Lab, Part

LINES = "lab.jsonl"
WHOLE = sum(part.share for part in PARTS)
GRACE = 5.0  # seconds between asking a process to end and ending it
PASSED, FAILED, CUT_OFF, LEFT_OUT = "passed", "failed", "cut off", "left out"


@dataclass
class Running:
    """A process that was begun, and what it was."""

    command: Command
    process: subprocess.Popen[bytes]
    began: float
    log: Path

    def end(self) -> None:
        """Ask the process and its own to end; then end them."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is not None:
                return
            os.killpg(self.process.pid, number)
            try:
                self.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                continue


def begin(command: Command, part: Part, lab: Lab, number: int) -> Running:
    """Start ``command`` in the checkout, its output in a file of its own."""
    log = lab.out / "logs" / f"{part.name}-{number}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = {
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "MASKMOE_LINES": str(lab.out / LINES),
        "MASKMOE_PART": part.name,
        **command.variables,
    }
    with log.open("ab") as file:
        process = subprocess.Popen(
            command.words,
            cwd=ROOT,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,  # of its own, but in our session: it ends with us at the latest
        )
    return Running(command, process, time.perf_counter(), log)


def finish(running: Sequence[Running], deadline: float, part: Part, lab: Lab) -> list[str]:
    """Wait until all have ended or the time is up; outcomes, each also as a line.

    Of commands that run together, the seconds are those until its turn to be waited for came.
    """
    outcomes = []
    try:
        for one in running:
            outcome = CUT_OFF
            try:
                left = max(0.0, deadline - time.perf_counter())
                outcome = FAILED if one.process.wait(left) else PASSED
            except subprocess.TimeoutExpired:
                one.end()
            outcomes.append(outcome)
            line: dict[str, Any] = {
                "event": "command",
                "part": part.name,
                "command": one.command.line(),
                "outcome": outcome,
                "status": one.process.returncode,
                "seconds": round(time.perf_counter() - one.began, 2),
                "log": one.log.name,
            }
            if outcome == FAILED:
                line["message"] = _tail(one.log)
            append(lab.out / LINES, line)
    finally:
        for one in running:
            one.end()
    return outcomes


def run_part(part: Part, lab: Lab) -> dict[str, Any]:
    """All commands of a part within its seconds; what became of it, also as a line."""
    began = time.perf_counter()
    append(lab.out / LINES, {"event": "begin", "part": part.name, "seconds": round(lab.seconds)})
    reason = part.obstacle(lab)
    outcomes: list[str] = []
    if reason is None:
        commands = part.commands(lab)
        if part.together:
            running = [begin(command, part, lab, k) for k, command in enumerate(commands)]
            outcomes = finish(running, began + lab.seconds, part, lab)
        else:
            for k, command in enumerate(commands):
                # What one leaves of its share, the next may have.
                left = lab.seconds - (time.perf_counter() - began)
                deadline = time.perf_counter() + left * _weight(k, len(commands))
                outcomes.append(_with_tries(command, part, lab, k, deadline))
    if FAILED in outcomes:
        reason = _refusal(part, lab)
    line: dict[str, Any] = {
        "event": "end",
        "part": part.name,
        "outcome": LEFT_OUT if reason is not None else _worst(outcomes),
        "seconds": round(time.perf_counter() - began, 2),
    }
    if reason is not None:
        line["reason"] = reason
    append(lab.out / LINES, line)
    return line


def _weight(k: int, count: int) -> float:
    """Share of the time that is left for command ``k``: the first of two gets most of it."""
    return 1.0 if k == count - 1 else 0.7


def _with_tries(command: Command, part: Part, lab: Lab, number: int, deadline: float) -> str:
    for attempt in range(command.tries):
        if attempt:
            command = replace(command, words=[*command.words, "--resume"])
        running = begin(command, part, lab, number)
        outcome = finish([running], deadline, part, lab)[0]
        status = running.process.returncode
        if outcome != FAILED or not (status == LOST or status < 0):
            break
    return outcome


def _worst(outcomes: Sequence[str]) -> str:
    return next((o for o in (FAILED, CUT_OFF) if o in outcomes), PASSED)


def _refusal(part: Part, lab: Lab) -> str | None:
    """What a log of the part says of this machine, if that is why it failed."""
    logs = "".join(map(_tail, sorted((lab.out / "logs").glob(f"{part.name}-*.log"))))
    return next((f"here it says: {text}" for text in part.refusals if text in logs), None)


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-1500:]


# --- The whole ---------------------------------------------------------------------------


def run(parts: Sequence[Part], lab: Lab, console: Console) -> int:
    """Every part, each with its share of the time that is left; a short table last.

    Returns:
        0; 1 where something failed; 2 where nothing failed but something was cut off.
    """
    lines = lab.out / LINES
    end = time.perf_counter() + lab.seconds
    append(lines, {"event": "machine", **results.machine(lab.device)})
    ended = []
    for k, part in enumerate(parts):
        left = max(0.0, end - time.perf_counter())
        seconds = left * part.share / sum(other.share for other in parts[k:])
        console.print(f"{part.name}: {part.text}, {seconds:.0f} s", highlight=False)
        ended.append(run_part(part, Lab(lab.out, lab.rehearsal, seconds)))
    _print(ended, read(lines), lab, console)
    must = [line for part, line in zip(parts, ended, strict=True) if not part.optional]
    outcomes = [line["outcome"] for line in must]
    return 1 if FAILED in outcomes else 2 if CUT_OFF in outcomes else 0


def _print(ended: list[dict[str, Any]], lines: list[dict[str, Any]], lab: Lab, to: Console) -> None:
    table = Table(title="The GPU lab" + (", rehearsed on the CPU" if lab.rehearsal else ""))
    for column in ("part", "outcome", "seconds", "tests", "what"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for line in ended:
        mine = [x for x in lines if x.get("part") == line["part"]]
        counts = Counter(x["outcome"] for x in mine if x["event"] == "test")
        tests = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items()))
        bad = [x for x in mine if x["event"] != "end" and x.get("outcome") == FAILED]
        first = next((x.get("test", x.get("command")) for x in bad), "")
        what = line.get("reason", first)
        cells = (line["part"], line["outcome"], f"{line['seconds']:.0f}", tests)
        table.add_row(*cells, str(what)[:70].replace("[", r"\["))
    to.print(table)
    to.print(f"{lab.out / LINES}, logs beside it", markup=False, highlight=False, soft_wrap=True)


def print_plan(parts: Sequence[Part], lab: Lab, console: Console) -> None:
    """Every part's time and commands."""
    whole = sum(part.share for part in parts)
    for part in parts:
        seconds = lab.seconds * part.share / whole
        one = Lab(lab.out, False, seconds)
        console.print(f"{part.name}, {seconds:.0f} s: {part.text}", highlight=False)
        how = "  (all at once)" if part.together else ""
        for command in part.commands(one):
            line = f"    {command.line()}{how}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{lab.seconds:.0f} s in all; what a part leaves, the next ones may have\n")


def main(words: Sequence[str], console: Console | None = None) -> int:
    """The command; see the module."""
    console = console or Console()
    arguments = _parser().parse_args(words)
    by_name = {part.name: part for part in PARTS}
    if arguments.list:
        for part in PARTS:
            console.print(f"{part.name:<12} {part.share:4.0f} s  {part.text}", highlight=False)
        return 0
    chosen = [by_name[name] for name in by_name if not arguments.part or name in arguments.part]
    # A part alone has its own time, not everybody's.
    share = sum(part.share for part in chosen) / WHOLE
    out = arguments.out or Path("build/gpu-rehearsal" if arguments.dry_run else "runs/gpu")
    lab = Lab(out.resolve(), arguments.dry_run, 60 * arguments.minutes * share)
    if arguments.dry_run:
        print_plan(chosen, lab, console)
    elif not torch.cuda.is_available():
        console.print("This torch sees no GPU. To rehearse without one: --dry-run", style="red")
        return 1
    (lab.out / LINES).unlink(missing_ok=True)
    lab.out.mkdir(parents=True, exist_ok=True)
    return run(chosen, lab, console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    names = [part.name for part in PARTS]
    add("--part", nargs="+", choices=names, metavar="NAME", help=f"only: {', '.join(names)}")
    add("--list", action="store_true", help="the parts and their times")
    add("--dry-run", action="store_true", help="print the plan and rehearse it on the CPU")
    add("--out", type=Path, metavar="DIR", help="default: runs/gpu")
    add("--minutes", type=_minutes, default=9.0, metavar="M", help="of all parts (default: 9)")
    return parser


def _minutes(text: str) -> float:
    value = float(text) if text.replace(".", "", 1).isdigit() else 0.0
    if not 0 < value < 1e4:
        raise argparse.ArgumentTypeError(f"expected minutes above 0, got {text!r}")
    return value


if __name__ == "__main__":
    # Cut off from outside: the processes it began end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main(sys.argv[1:]))
