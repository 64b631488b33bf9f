"""The GPU lab without a GPU: processes and their limits, what returns, its plan, a rehearsal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench.device import LOST
from bench.gpu import commands
from bench.gpu.check import main
from bench.gpu.commands import COMMANDS, CUDA_TESTS
from bench.gpu.json_lines import append, read
from bench.gpu.processes import run
from bench.gpu.pytest_plugin import shard_of
from bench.gpu.rehearsal import PLANTED, differences
from bench.gpu.report import (
    CUT_OFF,
    FAILED,
    MOST_LINES,
    PASSED,
    REFUSED,
    WIDTH,
    screen_lines,
    summarize,
    write,
)
from bench.gpu.tasks import FAULTS, ROOT, Lab, Task
from bench.layers.suites import SUITES
from tests.ops import test_cuda


def python(code: str, name: str = "some", **options: Any) -> Task:
    return Task(name, [sys.executable, "-c", textwrap.dedent(code)], **options)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path, True, 20.0)


@pytest.fixture
def console() -> Console:
    return Console(width=200)


def processes(lab: Lab) -> list[dict[str, Any]]:
    return [line for line in read(lab.lines, lab.spare) if line["event"] == "process"]


# --- Processes ---------------------------------------------------------------------------


def test_outcomes(lab: Lab) -> None:
    codes = {
        "passes": ("print('said')", PASSED),
        "fails": ("print('said'); raise SystemExit(4)", FAILED),
        "crashes": ("print('said', flush=True); import os; os.kill(os.getpid(), 11)", FAILED),
        "refused": ("print('said: Device not supported'); raise SystemExit(1)", REFUSED),
    }
    tasks = [
        python(code, name, refusals=("Device not supported",)) for name, (code, _) in codes.items()
    ]
    assert run(tasks, lab, 2) == {name: outcome for name, (_, outcome) in codes.items()}
    ended = {line["task"]: line for line in processes(lab)}
    assert [ended[name]["status"] for name in codes] == [0, 4, -11, 1]
    assert all("said" in line["output"] for line in ended.values())
    assert all("said" in (lab.work / "logs" / f"{name}.log").read_text() for name in codes)


@pytest.mark.parametrize("limit", ["seconds", "until", "lab"])
def test_time_runs_out(limit: str, lab: Lab) -> None:
    """A process ends with all that it began; what it wrote stays, and the others go on."""
    code = """
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(child.pid, flush=True)
        time.sleep(60)
    """
    options = {} if limit == "lab" else {limit: 1.5}
    began = time.perf_counter()
    tasks = [python(code, "hangs", **options), python("print('there')", "goes on")]
    short = Lab(lab.work, True, 3.0 if limit == "lab" else 20.0)
    assert run(tasks, short, 2) == {"hangs": CUT_OFF, "goes on": PASSED}
    assert time.perf_counter() - began < 9
    child = (lab.work / "logs/hangs.log").read_text().strip()
    for _ in range(50):  # an orphan is taken away by somebody else, soon
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the process of the one that was ended lives on")


def test_what_is_too_late_is_not_begun(lab: Lab) -> None:
    tasks = [python("import time; time.sleep(0.5)", "first"), python("pass", "late", until=0.2)]
    assert run(tasks, lab, 1) == {"first": PASSED, "late": CUT_OFF}
    assert [line["task"] for line in processes(lab)] == ["first"]


def test_some_run_together_and_some_alone(lab: Lab) -> None:
    meet = """
        import pathlib, time
        folder = pathlib.Path({0!r})
        (folder / {1!r}).touch()
        while not (folder / {2!r}).exists():
            time.sleep(0.01)
        time.sleep(0.3)
        (folder / {1!r}).unlink()
    """
    pair = [python(meet.format(str(lab.work), a, b), a) for a, b in ("ab", "ba")]
    alone = f"import os; raise SystemExit(bool({{'a', 'b'}} & {{*os.listdir({str(lab.work)!r})}}))"
    found = run([*pair, python(alone, "alone", alone=True)], lab, 8)
    assert set(found.values()) == {PASSED}


def test_a_lost_gpu_is_begun_again(lab: Lab) -> None:
    code = f"""
        import pathlib, sys
        seen = pathlib.Path({str(lab.work / "seen")!r})
        before = seen.read_text() if seen.exists() else ""
        seen.write_text(before + " ".join(sys.argv[1:]) + ";")
        sys.exit({LOST} if before.count(";") < 2 else 0)
    """
    run([python(code, tries=3, again=["--resume"])], lab, 1)
    assert (lab.work / "seen").read_text() == ";--resume;--resume;"
    assert [line["status"] for line in processes(lab)] == [LOST, LOST, 0]
    run([python("raise SystemExit(1)", "other", tries=3)], lab, 1)
    assert len(processes(lab)) == 4  # another failure is not tried again


def test_the_environment_of_a_process(lab: Lab) -> None:
    """No install: the checkout is on the path, whatever else was there before."""
    code = """
        import os
        print(os.getcwd(), os.environ["PYTHONPATH"].split(os.pathsep)[0], os.environ["OTHER"])
    """
    run([python(code, variables={"OTHER": "x"})], lab, 1)
    assert processes(lab)[0]["output"].split() == [str(ROOT), str(ROOT), "x"]


# --- Lines, and a full disk --------------------------------------------------------------


def test_lines_of_many_processes_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    code = f"""
        from bench.gpu.json_lines import append
        for k in range(200):
            append({str(path)!r}, {{"k": k, "text": "é" * 500}})
    """
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    running = [subprocess.Popen(command, env=variables) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert len(read(path)) == 600
    with path.open("ab") as file:
        file.write(b'{"k": 1, "te')  # cut off
    assert len(read(path)) == 600


def test_a_full_disk_costs_nothing_that_was_found(lab: Lab) -> None:
    """No line, log, json or archive can be written; the processes do not notice."""
    (lab.work / "logs").mkdir()
    for name in ("lab.jsonl", "logs/some.log"):
        (lab.work / name).symlink_to("/dev/full")
    try:
        outcomes = run([python("print('x' * 10**6 + ' the end')")], lab, 1)
        assert outcomes == {"some": PASSED}
        (line,) = processes(lab)
        assert line["output"].endswith("the end\n")
        found = summarize(outcomes, [line])
        assert screen_lines(found)[0].startswith("green some")
        (lab.work / "file").touch()
        refused = write(found, lab.work, lab.work / "file", "prove")
        assert len(refused) == 2
        assert all("file" in reason for reason in refused)
    finally:
        lab.spare.unlink(missing_ok=True)
    append("/dev/full", {"k": 1}, "/dev/full")  # dropped: its writer goes on
    assert read("/dev/full", lab.spare) == []


# --- What returns ------------------------------------------------------------------------


def test_the_screen_in_a_hundred_lines() -> None:
    """However much there is, all fit what a machine returns, and red is named last."""
    outcomes = {f"task {k}": (PASSED, FAILED, CUT_OFF)[k % 3] for k in range(60)}
    lines: list[dict[str, Any]] = [
        {
            "event": "process", "task": name, "outcome": outcome, "seconds": 1.0,
            "command": "python3", "output": "much\n" * 50 + "the last word",
        }
        for name, outcome in outcomes.items()
    ]  # fmt: skip
    for k, outcome in enumerate((PASSED, FAILED, CUT_OFF) * 300):
        test = f"tests/ops/test_some.py::test_{k}[{'long ' * 40}]"
        message = "first\nit broke"
        lines.append(
            {"event": "test", "task": "task 1", "test": test, "outcome": outcome}
            | ({"message": message} if outcome == FAILED else {})
        )
    screen = screen_lines(summarize(outcomes, lines))
    assert len(screen) <= MOST_LINES
    assert sum(len(line) + 1 for line in screen) <= 12_000
    assert max(map(len, screen)) <= WIDTH
    assert screen[-1] == "300 tests green, 300 red, 300 cut off"
    assert "the last word" in "".join(screen)
    for word in ("green", "cut off", "RED"):
        assert sum(line.startswith(word) for line in screen) > 10
    few = screen_lines(
        summarize({"task 1": FAILED}, [x for x in lines if x["task"] == "task 1"][:3])
    )
    assert few == [
        "RED task 1: 1 s 1 failed, 1 passed: the last word",
        "RED [task 1] " + few[1][13:],
        "1 tests green, 1 red, 0 cut off",
    ]


def test_one_json_and_one_archive(tmp_path: Path) -> None:
    work, out = tmp_path / "work/prove", tmp_path / "out"
    for name, size in (("lab.jsonl", 9), ("logs/a.log", 9), ("compiled/b", 9), ("big", 5 << 20)):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(b"x" * size)
    for green in (1, 2):  # refreshed
        assert write({"green": green}, work, out, "prove") == []
    assert sorted(path.name for path in out.iterdir()) == ["prove.json", "prove.tar.gz"]
    assert json.loads((out / "prove.json").read_text()) == {"green": 2}
    with tarfile.open(out / "prove.tar.gz") as archive:
        assert archive.getnames() == ["prove/lab.jsonl", "prove/logs/a.log"]


# --- The plan ----------------------------------------------------------------------------


def planned(name: str, monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    monkeypatch.setattr(commands, "nvidia", lambda tool: f"/usr/bin/{tool}")
    return COMMANDS[name].tasks(Lab(Path("work"), False, COMMANDS[name].seconds))


def test_commands_of_under_four_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [*COMMANDS] == ["prove", "measure", "tune"]
    for name, command in COMMANDS.items():
        assert command.seconds < 240
        tasks = planned(name, monkeypatch)
        assert len({task.name for task in tasks}) == len(tasks)
        together = [task for task in tasks if not task.alone]
        assert all(task.seconds or task.until for task in together)
        assert tasks[: len(together)] == together  # what is timed comes after all of these
        assert not any("cpu" in task.words for task in tasks)
    limits = [task.seconds or 0 for task in planned("measure", monkeypatch) if task.alone]
    compiled = max(task.until or 0 for task in planned("measure", monkeypatch))
    assert compiled + sum(limits) < COMMANDS["measure"].seconds - 10


def chosen(name: str, expression: str) -> bool:
    """What ``-k`` makes of the test ``name``: every word is looked for in it."""
    words = re.sub(r"\b(?!or\b|not\b)[\w.]+", lambda word: str(word[0] in name), expression)
    return bool(eval(words))


def test_every_test_for_a_gpu_is_in_one_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of ``test_cuda.py`` is chosen by one ``-k``, and by one only; shards are the whole."""
    tests = [name for name in dir(test_cuda) if name.startswith("test_")]
    assert len(tests) > 8
    choices = {
        words[words.index("-k") + 1]
        for words in (list(task.words) for task in planned("prove", monkeypatch))
        if CUDA_TESTS in words
    }
    for test in tests:
        assert sum(chosen(f"{CUDA_TESTS} {test}", choice) for choice in choices) == 1, test
    assert shard_of("2/8") == (2, 8)


def test_paths_of_the_plan_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for task in planned("prove", monkeypatch):
        for word in task.words:
            if word.startswith("tests/"):
                assert (ROOT / word).exists(), word
    assert (ROOT / FAULTS).exists()


def test_what_is_timed_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    commands_typed = " | ".join(task.line() for task in planned("measure", monkeypatch))
    for case in SUITES["gpu-quick"].cases():
        words = f"--families {case.family} --widths {case.width} --batch {case.batch}"
        compiled = f"{words} --dtypes {case.dtype} --rounds 1" in commands_typed
        assert compiled == (case.batch < commands.HUGE)
    assert "--networks movielens --dtypes bfloat16" in commands_typed
    assert "--suite gpu-quick" in commands_typed


def test_arguments(tmp_path: Path, console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["none"], "invalid choice: 'none'"),
        ([], "which of prove, measure, tune?"),
        (["prove", "--seconds", "0"], "expected seconds above 0"),
        (["prove", "--seconds", "nan"], "expected seconds above 0"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(words, console)
        assert message in capsys.readouterr().err
    if not torch.cuda.is_available():
        with console.capture() as capture:
            assert main(["prove", "--work", str(tmp_path / "none")], console) == 1
        assert "--dry-run" in capture.get()
        assert not (tmp_path / "none").exists()


# --- The rehearsal -----------------------------------------------------------------------


def test_faults_are_planted_and_the_rest_comes_back(tmp_path: Path, console: Console) -> None:
    """A failure, a hang, a crash, a slow property, a full disk: each costs itself alone."""
    words = ["prove", "--dry-run", "--tasks", "faults", "full"]
    words += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    with console.capture() as capture:
        assert main(words, console) == 0, capture.get()
    screen = capture.get().splitlines()
    assert "compute-sanitizer" in capture.get() or commands.nvidia("compute-sanitizer") is None
    assert screen[-1] == "prove rehearsed: everything came back as planted"
    found = json.loads((tmp_path / "out/prove.json").read_text("utf-8"))
    red = {x["test"].rpartition("::")[2]: x["message"] for x in found["red"]}
    assert red["test_hangs"].endswith("took too long")
    assert "in test_hangs" in red["test_hangs"]  # where it hung
    assert red["test_crashes"].endswith("ended its process, status -11")
    assert "No space left" in red["test_fills_the_disk"]
    assert found["tasks"]["faults"]["tries"] == 3
    # Its lines found no room on the disk: they came back by the memory.
    assert found["tasks"]["full disk"]["tests"] == {"passed": 2}
    with tarfile.open(tmp_path / "out/prove.tar.gz") as archive:
        assert {"prove/lab.jsonl", "prove/logs/faults.log"} <= set(archive.getnames())


def test_a_rehearsal_names_the_differences() -> None:
    lines = [
        {"event": "test", "task": "faults", "test": f"x.py::{name}", "outcome": outcome}
        for name, outcome in PLANTED.items()
    ]
    outcomes = {"faults": FAILED, "seen": PASSED}
    assert differences(outcomes, lines) == []
    assert differences(outcomes, lines[:-1]) == ["test_green_after: lost, not passed"]
    assert differences({"seen": CUT_OFF}, []) == ["seen: cut off, not passed"]


@pytest.mark.slow
def test_the_others_rehearsed(tmp_path: Path, console: Console) -> None:
    words = ["measure", "tune", "--dry-run", "--work", str(tmp_path)]
    with console.capture() as capture:
        assert main(words, console) == 0, capture.get()
    bench = json.loads((tmp_path / "measure/bench/bench.json").read_text("utf-8"))
    assert [result["family"] for result in bench["results"]] == ["toy3"]
    overhead = json.loads((tmp_path / "measure/bench/overhead.json").read_text("utf-8"))
    assert (
        sum(line["host"]["us"] > 0 for line in overhead["results"] if "host" in line) == 5 * 2 - 2
    )
    networks = json.loads((tmp_path / "measure/bench/mlp_training.json").read_text("utf-8"))
    assert {r["network"] for r in networks["results"]} == {"toy"}
    found = read(tmp_path / "tune/configs.jsonl")
    assert found
    assert all(record["own"] and record["us"] > 0 for record in found)
