"""``python -m tests.mutants``: do the tests notice when the code is wrong?

A seeded sample of small changes, mutants, is made in copies of the tree; a mutant is killed if a
test of those meant for its file fails, crashes or hangs. The score is the share that is killed
among those that are not equivalent, that is, that change a result at all.

Why no tool from PyPI: mutmut puts every function behind a trampoline, which registered ops,
TorchScript signatures and Triton's source reading do not survive; cosmic-ray has one test command
for all files and changes the tree it runs in; neither draws a seeded sample, starts a run without
a new import of torch, or knows C++. What is left is small: the parsers are `ast` and tree-sitter.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import random
import re
import signal
import sys
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.mutants import cpp_operators, python_operators, targets, trial
from tests.mutants.mutant import Mutant, apply, sample

STATE = trial.WORK / "state.json"
EQUIVALENTS = Path(__file__).with_name("equivalents.toml")
ENOUGH = 0.95
CPP_SHARE = 1 / 3


@dataclass(frozen=True)
class Job:
    """A run of tests: of one mutant, or, with no change, of the code as it is."""

    name: str
    tests: list[str]
    change: Mutant | None
    environment: dict[str, str]


class Equivalents:
    """The committed list of mutants that change no result, matched by content."""

    def __init__(self, entries: list[dict[str, str]]) -> None:
        self.entries = entries
        self.used: set[int] = set()

    def reason(self, mutant: Mutant) -> str | None:
        """Why ``mutant`` is not to be killed; None: it is."""
        for n, entry in enumerate(self.entries):
            wanted = {key: value for key, value in entry.items() if key != "reason"}
            if all(getattr(mutant, key) == value for key, value in wanted.items()):
                self.used.add(n)
                return entry["reason"]
        return None

    def stale(self) -> list[dict[str, str]]:
        """Entries that matched none of the mutants asked about."""
        return [entry for n, entry in enumerate(self.entries) if n not in self.used]


def tests_for(file: str) -> list[str]:
    """The tests that are to notice a change of ``file``."""
    table = targets.CPP if file.startswith("csrc") else targets.PYTHON
    return next(tests for pattern, tests in table.items() if fnmatch.fnmatch(file, pattern))


def all_mutants() -> tuple[list[Mutant], list[Mutant]]:
    """Every mutant of the targets, in Python and in C++."""
    python = [
        each
        for file in _files(targets.PYTHON)
        for each in python_operators.mutants(file, (trial.ROOT / file).read_text())
    ]
    here = trial.instruction_sets()
    if not here:
        sys.exit("the extension is not built, so no C++ mutant could be noticed: make build")
    cpp, absent = [], []
    for file in _files(targets.CPP):
        needs = [isa for pattern, isa in targets.NEEDS.items() if fnmatch.fnmatch(file, pattern)]
        if all(isa in here for isa in needs):
            cpp += cpp_operators.mutants(file, (trial.ROOT / file).read_text())
        else:
            absent.append(Path(file).name)
    if absent:
        print(f"left out, as this processor does not run them: {', '.join(absent)}")
    return python, cpp


def _files(table: dict[str, list[str]]) -> list[str]:
    found = {
        path.relative_to(trial.ROOT).as_posix()
        for pattern in table
        for path in trial.ROOT.glob(pattern)
        if path.suffix in (".py", ".cpp", ".h")
    }
    return sorted(file for file in found if tests_for(file))


def main() -> int:
    """Draw, run, report; 0 where enough mutants are killed."""
    arguments = _arguments()
    end = time.monotonic() + 60 * arguments.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # children are ended on the way out
    trial.WORK.mkdir(parents=True, exist_ok=True)
    state = _state()
    chosen, number_of, loads = _draw(arguments, state)
    trial.preload()
    trees = [trial.copy_tree(trial.WORK / f"tree-{n}") for n in range(arguments.jobs)]
    _run(_unchanged(chosen, loads), trees, state, end)
    unchanged = {name: r for name, r in state["results"].items() if name.startswith("unchanged")}
    if failed := [name for name, result in unchanged.items() if not result["passed"]]:
        for name in failed:
            print(f"fails without a mutant, by {state['results'].pop(name)['by']}: {name}")
        _save(state)
        return 2
    jobs = []
    for each in chosen:
        environment = _environment(each)
        if (number := number_of.get(each.name)) is not None:
            environment |= {**loads, "MASKMOE_MUTANT": str(number)}
        jobs.append(Job(each.name, tests_for(each.file), each, environment))
    _run(jobs, trees, state, end)
    known = {each.name: state["results"].get(each.name) for each in chosen}
    state["last"] = {name: result for name, result in known.items() if result is not None}
    _save(state)
    return _report(chosen, state["last"])


def _environment(mutant: Mutant) -> dict[str, str]:
    return {"TRITON_INTERPRET": str(int(mutant.file in targets.INTERPRETED))}


def _unchanged(chosen: list[Mutant], loads: dict[str, str]) -> list[Job]:
    """The tests of all, without a mutant: who fails here would kill whatever comes."""
    wanted = {
        (path, tuple(_environment(each).items()))
        for each in chosen
        for path in tests_for(each.file)
    }
    return [
        Job(f"unchanged: {path}, {dict(environment)}", [path], None, {**dict(environment), **loads})
        for path, environment in sorted(wanted)
    ]


def _draw(
    arguments: argparse.Namespace, state: dict
) -> tuple[list[Mutant], dict[str, int], dict[str, str]]:
    """The sample, the numbers of C++ mutants in their build, and what makes a child load it."""
    equivalents = Equivalents(tomllib.loads(EQUIVALENTS.read_text())["equivalent"])
    python, cpp = (
        [each for each in mutants if equivalents.reason(each) is None] for mutants in all_mutants()
    )
    for entry in equivalents.stale():
        print(f"an equivalent that matches nothing: {entry}", file=sys.stderr)
    if arguments.again:
        survivors = {r["identity"] for r in state["last"].values() if r["passed"]}
        python, cpp = ([m for m in some if m.identity in survivors] for some in (python, cpp))
        count, spare, share = len(python), len(cpp), len(cpp)
    else:
        wanted = re.compile(arguments.only)
        python, cpp = ([m for m in some if wanted.search(m.name)] for some in (python, cpp))
        share = 0 if not cpp else round(arguments.count * CPP_SHARE) if python else arguments.count
        count, spare = arguments.count - share, share + share // 4  # not all of them compile
    chosen = sample(python, count, arguments.seed)
    for each in chosen:
        compile(apply((trial.ROOT / each.file).read_text(), [each]), each.file, "exec")
    numbers = dict(enumerate(sample(cpp, spare, arguments.seed), 1))
    if not numbers:
        return chosen, {}, {}
    print(f"building the extension with {len(numbers)} mutants ...", flush=True)
    library, built = trial.build(numbers)
    number_of = {numbers[n].name: n for n in sorted(built)[:share]}
    chosen += [each for each in numbers.values() if each.name in number_of]
    random.Random(arguments.seed).shuffle(chosen)
    return chosen, number_of, {"MASKMOE_EXTENSION": str(library)}


def _run(jobs: list[Job], trees: list[Path], state: dict, end: float) -> None:
    """Run what has no result yet, one child a tree, until the time is over."""
    waiting = [job for job in jobs if job.name not in state["results"]][::-1]
    free, running = list(trees), {}
    try:
        while waiting or running:
            while waiting and free and time.monotonic() < end:
                job = waiting.pop()
                python = job.change if job.change and job.change.file.endswith(".py") else None
                child = trial.Child(free.pop(), job.tests, python, job.environment)
                running[child] = job
            if not running:
                break
            time.sleep(0.05)
            for child in list(running):
                if (outcome := child.outcome()) is None:
                    continue
                job = running.pop(child)
                free.append(child.tree)
                state["results"][job.name] = {
                    "passed": outcome.passed,
                    "by": outcome.by,
                    "seconds": round(outcome.seconds, 1),
                    "identity": job.change.identity if job.change else "",
                }
                _save(state)
                _show(job, outcome)
    finally:
        for child in running:
            child.kill()


def _show(job: Job, outcome: trial.Outcome) -> None:
    words = ("FAILS", "passes") if job.change is None else ("killed", "SURVIVED")
    by = f"  by {outcome.by}" if outcome.by else ""
    print(f"{words[outcome.passed]:<8} {outcome.seconds:6.1f} s  {job.name}{by}", flush=True)


def _report(chosen: Iterable[Mutant], results: dict[str, dict]) -> int:
    """Print the table and the survivors; the exit status."""
    by_file: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    survivors, missing = [], 0
    for each in sorted(chosen, key=lambda m: (m.file, m.number)):
        result = results.get(each.name)
        if result is None:
            missing += 1
            continue
        by_file[each.file][0] += not result["passed"]
        by_file[each.file][1] += 1
        if result["passed"]:
            survivors.append(each)
    print(f"\n{'file':<44} killed    of")
    for file, (killed, count) in sorted(by_file.items()):
        print(f"{file:<44} {killed:6d} {count:5d}")
    for each in survivors:
        print(f"\n{each.file}:{each.number} ({each.operator})\n- {each.line}\n+ {each.becomes}")
    killed, count = (sum(row[column] for row in by_file.values()) for column in (0, 1))
    score = killed / count if count else 0.0
    print(f"\n{killed} of {count} killed: {score:.1%}; {ENOUGH:.0%} is wanted")
    if missing:
        print(f"{missing} were not run, for the time was over: the same command goes on")
    return int(score < ENOUGH or missing > 0)


def _state() -> dict:
    """What is known of this tree; of an older one, only which mutants survived last."""
    digest = hashlib.sha256()
    for folder in ("maskmoe_kernels", "csrc", "tests"):
        for path in sorted((trial.ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp", ".txt") and path.parent.name != "mutants":
                digest.update(path.read_bytes())
    state = json.loads(STATE.read_text()) if STATE.exists() else {"last": {}}
    if state.get("digest") != digest.hexdigest():
        state = {"digest": digest.hexdigest(), "results": {}, "last": state["last"]}
    return state


def _save(state: dict) -> None:
    draft = STATE.with_suffix(".draft")
    draft.write_text(json.dumps(state, indent=1))
    draft.replace(STATE)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tests.mutants", description="Do the tests notice when the code is wrong?"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample (0)")
    parser.add_argument("--count", type=int, default=180, help="mutants, a third in C++ (180)")
    parser.add_argument("--minutes", type=float, default=40, help="start none after these (40)")
    parser.add_argument("--only", default="", help="regular expression: file:line: operator: code")
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    parser.add_argument(
        "--again", action="store_true", help="only those that survived in the last run"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
