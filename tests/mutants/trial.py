"""One mutant against its tests: in a copy of the tree, in a forked process, for a limited time.

The parent has imported torch and pytest, and forks: a test run starts at once, and what a mutant
breaks, a crash or a hang included, stays in the child.
"""

from __future__ import annotations

import compileall
import json
import os
import py_compile
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.mutants import cpp_operators
from tests.mutants.mutant import Mutant, apply

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "mutants"
#: Memory that a child may ask for: a mutant in a size is not to take the machine's.
MEMORY = 12 << 30
#: Seconds of processor time for one test, import or collection: none takes a quarter of it, so it
#: hangs. A busy machine stretches the time on the wall, which is for those that wait for ever.
LIMIT = 60
WALL = 900
#: Tests by name that come last: they compile, or start processes that import torch anew.
SLOWER = "compile or export or process or environment or reason or shared_out or thousand or fork"
_COPIED = ("maskmoe_kernels", "tests", "bench", "csrc", "pyproject.toml", "setup.py", "README.md",
           "CHANGELOG.md", "CITATION.cff", "CMakeLists.txt", "MANIFEST.in")  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a run of tests ended."""

    passed: bool
    by: str  # the first failing test, or what else ended the run
    seconds: float


def copy_tree(to: Path) -> Path:
    """A copy of what the tests need, with byte code that is checked by content.

    Byte code is checked by time and size otherwise, and a mutant often has both.
    """
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy2(source, to / name)
    by_content = py_compile.PycInvalidationMode.CHECKED_HASH
    compileall.compile_dir(to / "maskmoe_kernels", quiet=1, invalidation_mode=by_content)
    return to


@cache
def instruction_sets() -> list[str]:
    """Those that the extension has kernels for and this processor runs, or emulates."""
    code = "from maskmoe_kernels.ops import native; print(*native.isas())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = done.stdout.split()
    return list(dict.fromkeys([*names, *(name.removesuffix("-emulated") for name in names)]))


def build(chosen: dict[int, Mutant]) -> tuple[Path, set[int]]:
    """The extension with all C++ mutants behind the switch, and the numbers of those in it.

    One that the compiler refuses is left out: the lines of its complaint name it.

    Raises:
        RuntimeError: A build fails for another reason.
    """
    tree = WORK / "cpp"
    left = dict(chosen)
    while True:
        texts = {name: (ROOT / name).read_text() for name in ("setup.py", "CMakeLists.txt")}
        for path in filter(Path.is_file, (ROOT / "csrc").rglob("*")):
            file = path.relative_to(ROOT).as_posix()
            if path.stem.startswith("isa_") and path.stem[4:] not in instruction_sets():
                continue  # half the time of the build, for kernels that nobody here could call
            mine = [(n, each) for n, each in left.items() if each.file == file]
            text = path.read_text()
            texts[file] = cpp_operators.switched(text, mine) if mine else text
        texts["csrc/common/mutants.cpp"] = cpp_operators.DEFINITION
        _write(tree, texts)
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "."],
            cwd=tree,
            env={**os.environ, "MASKMOE_BUILD": "cpu"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return tree / "maskmoe_kernels" / "_C.abi3.so", set(left)
        refused = {n for n in left if f"{cpp_operators.SWITCH} == {n} " in done.stderr}
        if not refused:
            raise RuntimeError(f"the build with mutants fails:\n{done.stderr[-3000:]}")
        left = {n: each for n, each in left.items() if n not in refused}


def _write(tree: Path, texts: dict[str, str]) -> None:
    """Make these the files of ``tree``; one that has its text already keeps its time."""
    for path in filter(Path.is_file, (tree / "csrc").rglob("*")):
        if path.relative_to(tree).as_posix() not in texts:
            path.unlink()
    for file, text in texts.items():
        path = tree / file
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


class Child:
    """A forked process that runs tests in a tree, which is given back as it was."""

    def __init__(
        self,
        tree: Path,
        tests: list[str],
        change: Mutant | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.tree, self.change = tree, change
        self.start = time.monotonic()
        self._result = tree / "result.json"
        self._result.unlink(missing_ok=True)
        if change is not None:
            text = (ROOT / change.file).read_text()
            (tree / change.file).write_text(apply(text, [change]))
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _run(tree, tests, environment or {}, self._result)

    def outcome(self) -> Outcome | None:
        """How it ended; None: it runs on."""
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        seconds = time.monotonic() - self.start
        if ended == 0:
            if seconds < WALL:
                return None
            self.kill()
            result = Outcome(False, f"{WALL} s are over in {self._last_test()}", seconds)
        elif os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            name = f"{LIMIT} s of processor time are over" if name == "SIGPROF" else name
            result = Outcome(False, f"{name} in {self._last_test()}", seconds)
        else:
            code = os.WEXITSTATUS(status)
            result = Outcome(code == 0, self._last_test() if code else "", seconds)
        if self.change is not None:
            shutil.copy2(ROOT / self.change.file, self.tree / self.change.file)
        return result

    def _last_test(self) -> str:
        try:
            return str(json.loads(self._result.read_text()))
        except (OSError, ValueError):
            return "import"

    def kill(self) -> None:
        """End it and what it started."""
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def preload() -> None:
    """Import what every child needs and no mutant changes."""
    os.environ.update(
        OMP_NUM_THREADS="1", HYPOTHESIS_PROFILE="mutants", PYTHONDONTWRITEBYTECODE="1"
    )
    import hypothesis.strategies
    import numpy.random
    import pytest
    import torch

    _ = hypothesis, numpy, pytest, torch
    if "maskmoe_kernels" in sys.modules:
        raise RuntimeError("the package is imported already: children would not see a mutant")


def _run(tree: Path, tests: list[str], environment: dict[str, str], result: Path) -> None:
    """The child: never returns."""
    code = 70
    try:
        os.setsid()
        log = os.open(tree / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w")
        signal.setitimer(signal.ITIMER_PROF, LIMIT)  # ends the process
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.environ.update(environment, PYTHONPATH=str(tree))
        os.chdir(tree)
        sys.path[:] = [str(tree), *(p for p in sys.path if p not in ("", str(ROOT)))]
        sys.dont_write_bytecode = True
        for name in [n for n in sys.modules if n == "tests" or n.startswith("tests.")]:
            del sys.modules[name]
        import pytest

        options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow"]
        runs = "" if environment.get("TRITON_INTERPRET") == "1" else " and not triton"
        for which in (f"not ({SLOWER})", f"({SLOWER})"):
            chosen = ["-k", which + runs, *tests]
            code = int(pytest.main([*options, *chosen], plugins=[_Recorder(result)]))
            if code == pytest.ExitCode.NO_TESTS_COLLECTED:
                code = 0
            if code:
                break
    finally:
        os._exit(code)


class _Recorder:
    """Keeps the name of the test that runs: where a run ends early, it is the one that ended it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_collectreport(self, report: object) -> None:
        if report.failed:
            self.path.write_text(json.dumps(f"collection of {report.nodeid}"))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        self.path.write_text(json.dumps(nodeid))
