"""The results of the GPU lab: a hundred lines on the screen, one json file, one archive."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maskmoe_kernels.experiments.shared.report import write_json

PASSED, FAILED, CUT_OFF, REFUSED = "passed", "failed", "cut off", "refused"
#: Of the screen: a remote machine may return the last 12,000 characters only.
MOST_LINES, WIDTH = 100, 118
MOST_RED, MOST_CUT = 40, 18
#: Bytes: larger files are left out of the archive; the json keeps the end of a process's output.
LARGE, TAIL = 4 << 20, 12_000


def summarize(outcomes: Mapping[str, str], lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The results of a command except its measurements: green, red and cut off, by name."""
    tests = [x for x in lines if x["event"] == "test"]
    processes = [x for x in lines if x["event"] == "process"]
    tasks = {}
    for name, outcome in outcomes.items():
        mine = [x for x in processes if x["task"] == name]
        tasks[name] = {
            "outcome": outcome,
            "seconds": round(sum(x["seconds"] for x in mine), 1),
            "tests": dict(Counter(x["outcome"] for x in tests if x["task"] == name)),
            "tries": len(mine),
            "command": mine[-1]["command"] if mine else None,
            "output": mine[-1]["output"] if mine else "",
        }
    return {
        "machine": next((x for x in lines if x["event"] == "machine"), {}),
        "tasks": tasks,
        "red": [x for x in tests if x["outcome"] == FAILED],
        "cut off": [x for x in tests if x["outcome"] == CUT_OFF],
        "green": sum(x["outcome"] == PASSED for x in tests),
    }


def screen_lines(found: Mapping[str, Any]) -> list[str]:
    """At most ``MOST_LINES``: green, then cut off, then red, then counts.

    A red or cut off process is named with its last line of output.
    """
    green, cut, red = [], [], []
    for name, task in found["tasks"].items():
        counts = ", ".join(f"{n} {what}" for what, n in sorted(task["tests"].items()))
        line = f"{name}: {task['seconds']:.0f} s {counts}"
        last = task["output"].strip().splitlines()[-1:] or [""]
        if task["outcome"] == PASSED:
            green.append(f"green   {line}")
        elif task["outcome"] == REFUSED:
            green.append(f"refused {line}: {last[0]}")
        elif task["outcome"] == CUT_OFF:
            cut.append(
                f"cut off {line}: {last[0]}" if task["tries"] else f"cut off {name}: not started"
            )
        else:
            red.append(f"RED     {line}: {last[0]}")
    cut += [f"cut off [{x['task']}] {_short(x['test'])}" for x in found["cut off"]]
    red += [f"RED     [{x['task']}] {_short(x['test'])}: {_last(x)}" for x in found["red"]]
    ends = f"{found['green']} tests green, {len(found['red'])} red, {len(found['cut off'])} cut off"
    most_green = MOST_LINES - MOST_CUT - MOST_RED - 1
    lines = [
        *_at_most(most_green, green),
        *_at_most(MOST_CUT, cut),
        *_at_most(MOST_RED, red),
        ends,
    ]
    return [" ".join(line.split())[:WIDTH] for line in lines]


def _short(test: str) -> str:
    return test.rpartition("/")[2]


def _last(line: Mapping[str, Any]) -> str:
    return (str(line.get("message", "")).strip().splitlines() or [""])[-1]


def _at_most(count: int, lines: Sequence[str]) -> list[str]:
    if len(lines) <= count:
        return [*lines]
    return [*lines[: count - 1], f"        and {len(lines) - count + 1} more"]


def write(found: Mapping[str, Any], work: Path, out: Path, name: str) -> list[str]:
    """Write ``out/name.json`` and ``out/name.tar.gz``, each completely or not at all.

    Returns:
        The files that could not be written, with the reason.
    """
    unwritten = []
    for kind, write_one in (("json", _write_found), ("tar.gz", _write_archive)):
        path = out / f"{name}.{kind}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_one(path, found, work)
        except OSError as error:
            unwritten.append(f"{path}: {error}")
    return unwritten


def _write_found(path: Path, found: Mapping[str, Any], _: Path) -> None:
    write_json(path, found)


def _write_archive(path: Path, _: Mapping[str, Any], work: Path) -> None:
    """The files of the processes, except compiled kernels."""
    part = path.with_suffix(".part")
    try:
        with tarfile.open(part, "w:gz", compresslevel=5) as archive:
            for file in sorted(work.rglob("*")):
                member = file.relative_to(work)
                if member.parts[0] != "compiled" and file.is_file() and file.stat().st_size < LARGE:
                    archive.add(file, f"{work.name}/{member}", recursive=False)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
