"""The GPU lab without a GPU: its plan, its clock, its lines, and a rehearsal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import gpu_check, gpu_parts
from bench.command import LOST
from bench.gpu_check import CUT_OFF, FAILED, LEFT_OUT, LINES, PASSED, main, run, run_part
from bench.gpu_lines import shard_of
from bench.gpu_log import append, read
from bench.gpu_parts import CUDA_TESTS, PARTS, ROOT, TESTS, Command, Lab, Part
from tests.ops import test_cuda

NAMES = [part.name for part in PARTS]


def python(code: str, **options: Any) -> Command:
    return Command([sys.executable, "-c", textwrap.dedent(code)], **options)


def part(*commands: Command, **options: Any) -> Part:
    return Part("some", "for a test", 10, lambda lab: list(commands), **options)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path, True, 30.0)


@pytest.fixture
def console() -> Console:
    return Console(width=200)


def lines(lab: Lab, event: str) -> list[dict[str, Any]]:
    return [line for line in read(lab.out / LINES) if line["event"] == event]


# --- Commands and time -------------------------------------------------------------------


def test_outcomes(lab: Lab) -> None:
    outcomes = {
        "pass": PASSED,
        "raise SystemExit(4)": FAILED,
        "import os; os.kill(os.getpid(), 9)": FAILED,
    }
    for code, outcome in outcomes.items():
        assert run_part(part(python(f"print('said'); {code}")), lab)["outcome"] == outcome
    told = lines(lab, "command")
    assert [line["status"] for line in told] == [0, 4, -9]
    assert "said" in told[1]["message"]
    assert all((lab.out / "logs" / line["log"]).read_text().count("said") for line in told)


@pytest.mark.parametrize("together", [False, True])
def test_time_runs_out(lab: Lab, together: bool) -> None:
    """What was written stays, and the process ends with all that it began."""
    code = """
        import json, os, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        with open(os.environ["MASKMOE_LINES"], "a") as file:
            file.write(json.dumps({"event": "test", "child": child.pid}) + "\\n")
        time.sleep(60)
    """
    short = Lab(lab.out, True, 2.0)
    began = time.perf_counter()
    line = run_part(part(python(code), together=together), short)
    assert line["outcome"] == CUT_OFF
    assert time.perf_counter() - began < 8
    (child,) = (line["child"] for line in lines(lab, "test"))
    for _ in range(50):  # an orphan is taken away by somebody else, soon
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the command's own process lives on")


def test_commands_run_together(lab: Lab) -> None:
    meet = """
        import pathlib, sys, time
        me, other = (pathlib.Path({0!r}) / name for name in {1!r})
        me.touch()
        while not other.exists():
            time.sleep(0.01)
    """
    pair = [python(meet.format(str(lab.out), names)) for names in ("ab", "ba")]
    assert run_part(part(*pair, together=True), lab)["outcome"] == PASSED


def test_a_lost_gpu_is_begun_again(lab: Lab) -> None:
    code = f"""
        import pathlib, sys
        seen = pathlib.Path({str(lab.out / "seen")!r})
        before = seen.read_text() if seen.exists() else ""
        seen.write_text(before + " ".join(sys.argv[1:]) + ";")
        sys.exit({LOST} if before.count(";") < 2 else 0)
    """
    assert run_part(part(python(code, tries=3)), lab)["outcome"] == PASSED
    assert (lab.out / "seen").read_text() == ";--resume;--resume --resume;"
    assert run_part(part(python("raise SystemExit(1)", tries=3)), lab)["outcome"] == FAILED
    assert len(lines(lab, "command")) == 4  # another failure is not tried again


def test_the_environment_of_a_command(lab: Lab) -> None:
    """No install: the checkout is on the path, whatever else was there before."""
    code = """
        import os
        print(os.getcwd(), os.environ["PYTHONPATH"].split(os.pathsep)[0], os.environ["OTHER"])
    """
    run_part(part(python(code, variables={"OTHER": "x"})), lab)
    assert (lab.out / "logs/some-0.log").read_text().split() == [str(ROOT), str(ROOT), "x"]


def test_the_time_that_is_left_is_shared(lab: Lab, console: Console) -> None:
    seen: list[float] = []

    def commands(one: Lab) -> list[Command]:
        seen.append(one.seconds)
        return []

    parts = [Part(str(k), "", share, commands) for k, share in enumerate((10, 20, 70))]
    with console.capture():
        assert run(parts, Lab(lab.out, True, 100.0), console) == 0
    assert seen == pytest.approx([10, 22.2, 100], rel=0.03)  # nobody used any


@pytest.mark.parametrize(
    ("code", "optional", "status"),
    [("pass", False, 0), ("raise SystemExit(1)", False, 1), ("raise SystemExit(1)", True, 0)],
)
def test_the_exit_status(
    code: str, optional: bool, status: int, lab: Lab, console: Console
) -> None:
    with console.capture() as capture:
        assert run([part(python(code), optional=optional)], lab, console) == status
    assert str(lab.out / LINES) in capture.get()
    assert [line["event"] for line in read(lab.out / LINES)] == [
        "machine",
        "begin",
        "command",
        "end",
    ]


def test_what_cannot_run_is_left_out_with_its_reason(lab: Lab, console: Console) -> None:
    some = part(python("raise SystemExit(1)"), obstacle=lambda lab: "no such tool")
    with console.capture() as capture:
        assert run([some], lab, console) == 0
    assert lines(lab, "end")[0]["outcome"] == LEFT_OUT
    assert "no such tool" in capture.get()


def test_a_machine_that_refuses_a_tool_is_a_reason(lab: Lab) -> None:
    code = "print('Device not {}'); raise SystemExit(1)"
    refusals = ("Device not supported",)
    for word, outcome in (("found", FAILED), ("supported", LEFT_OUT)):
        line = run_part(part(python(code.format(word)), refusals=refusals), lab)
        assert line["outcome"] == outcome
    assert line["reason"] == "here it says: Device not supported"


def test_lines_of_many_processes_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    code = f"""
        from bench.gpu_log import append
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


# --- The plan ----------------------------------------------------------------------------


def test_the_parts() -> None:
    asked = {"tests", "memory", "graphs", "determinism", "sanitizer", "bench", "overhead"}
    assert {*asked, "build", "networks"} == set(NAMES)
    assert 480 <= gpu_check.WHOLE <= 540
    assert NAMES[-1] == "bench"  # which takes what time is left


def chosen(name: str, expression: str) -> bool:
    """What ``-k`` makes of the test ``name``: every word is looked for in it."""
    words = re.sub(r"\b(?!or\b|not\b)[\w.]+", lambda word: str(word[0] in name), expression)
    return bool(eval(words))


def test_every_test_for_a_gpu_is_in_one_part() -> None:
    """Each of ``test_cuda.py`` is chosen by one part's ``-k``, and by one only."""
    tests = [name for name in dir(test_cuda) if name.startswith("test_")]
    assert len(tests) > 8
    parts = dict.fromkeys(tests, 0)
    for name in ("tests", "memory", "graphs", "determinism"):
        (command, *_) = PARTS[NAMES.index(name)].commands(Lab(Path("x"), False, 100))
        choice = command.words[list(command.words).index("-k") + 1]
        for test in tests:
            parts[test] += chosen(f"{CUDA_TESTS} {test}", choice)
    assert parts == dict.fromkeys(tests, 1)


def test_every_folder_of_tests_is_named() -> None:
    folders = {f"tests/{path.parent.name}" for path in (ROOT / "tests").glob("*/test_*.py")}
    on_the_cpu = {"tests/fuzz", "tests/mutants"}  # they would take the GPU's time for nothing
    assert folders - on_the_cpu <= set(TESTS)


def test_shards_are_the_whole() -> None:
    assert shard_of("2/8") == (2, 8)
    items = list(range(21))
    assert sorted(k for n in range(8) for k in items[n::8]) == items


def test_the_plan(tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "sanitizer", lambda: None)
    lab = Lab(tmp_path, True, 540)
    with console.capture() as capture:
        gpu_check.print_plan(PARTS, lab, console)
    told = capture.get()
    for words in (
        "python3 setup.py -q build_ext --inplace",
        "--device cuda tests/ops/test_cuda.py -k big_offsets",
        "compute-sanitizer --tool racecheck",
        "python3 -m bench --device cuda --suite gpu-quick",
        "python3 -m bench.overhead --device cuda",
        "540 s in all",
    ):
        assert words in told
    assert "--device cpu" not in told
    assert gpu_parts._no_sanitizer(Lab(tmp_path, False, 1)) is not None


def test_list_and_arguments(
    tmp_path: Path, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.capture() as capture:
        assert main(["--list"], console) == 0
    assert [line.split()[0] for line in capture.get().splitlines()] == NAMES
    for words in (["--part", "none"], ["--minutes", "0"], ["--minutes", "nan"]):
        with pytest.raises(SystemExit, match="2"):
            main(words, console)
    if not torch.cuda.is_available():
        with console.capture() as capture:
            assert main(["--out", str(tmp_path / "none")], console) == 1
        assert "--dry-run" in capture.get()
        assert not (tmp_path / "none").exists()


# --- The rehearsal -----------------------------------------------------------------------


def test_a_part_rehearsed(tmp_path: Path, console: Console) -> None:
    """Tests leave a line each; an earlier run's lines are gone."""
    append(tmp_path / LINES, {"event": "end", "part": "old"})
    words = ["--dry-run", "--part", "memory", "--out", str(tmp_path)]
    with console.capture() as capture:
        assert main(words, console) == 0
    assert "-k big_offsets" in capture.get()
    written = read(tmp_path / LINES)
    assert not [line for line in written if line.get("part") == "old"]
    tests = [line for line in written if line["event"] == "test"]
    outcomes = {line["test"].rpartition("[")[2]: line["outcome"] for line in tests}
    assert outcomes["hidden-rehearsal]"] == PASSED
    assert len(outcomes) == 4
    if not torch.cuda.is_available():
        (reason,) = {line["message"] for line in tests if line["outcome"] == "skipped"}
        assert "needs an NVIDIA GPU" in reason


@pytest.mark.slow
def test_the_others_rehearsed(tmp_path: Path, console: Console) -> None:
    parts = ["build", "tests", "sanitizer", "overhead", "networks", "bench"]
    with console.capture() as capture:
        assert main(["--dry-run", "--out", str(tmp_path), "--part", *parts], console) == 0
    told = capture.get()
    assert told.count("passed") >= len(parts) - 1
    assert "2 passed" in told
    assert "it writes into the checkout" in told
    bench = json.loads((tmp_path / "bench/bench.json").read_text("utf-8"))
    assert [result["family"] for result in bench["results"]] == ["toy3"]
    overhead = json.loads((tmp_path / "overhead.json").read_text("utf-8"))
    found = {line["door"]: line for line in overhead["results"] if "host" in line}
    assert found.keys() == {
        "plain function", "define/impl", "custom_op", "triton_op", "front end"
    }  # fmt: skip
    assert all(line["host"]["us"] > 0 for line in found.values())
    assert "21 checks, 0 wrong" in (tmp_path / "logs/sanitizer-0.log").read_text("utf-8")
