"""``python -m bench``: files, resuming, exit codes."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from bench import command
from bench.arguments import parse
from bench.cases import Case
from bench.contender import Unavailable
from bench.layers import results
from bench.layers import run as layer_run
from bench.layers.ratios import line_of
from bench.layers.suites import SUITES
from bench.layers.summary import summarize
from bench.networks import estimators, mlp_training
from bench.peak_rates import PeakRates, measure_peak_rates
from maskmoe_kernels.errors import BackendError, DataError
from tests.bench.handmade import document, result

RESULTS = Path(command.__file__).parent / "results"
TIMES = {"ours": 100.0, "exact": 200.0, "floor": 50.0}
TINY = "--families toy3 ncf4 --widths 8 --batch 16 --dtypes float32".split()
TINY += "--rounds 2 --budget 0 --out".split()


@pytest.fixture(autouse=True)
def _quick_peak_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_run, "measure_peak_rates", lambda *_: PeakRates(100.0, 10.0))


@pytest.fixture
def console() -> Console:
    return Console(width=200)


def run(words: list[str], console: Console) -> tuple[int, str]:
    with console.capture() as capture:
        code = command.main(words, console)
    return code, capture.get()


def cases(path: Path) -> list[str]:
    written = json.loads((path / results.NAME).read_text("utf-8"))["results"]
    return [r["family"] for r in written]


def test_a_run(tmp_path: Path, console: Console) -> None:
    code, printed = run([*TINY, str(tmp_path)], console)
    assert code == 0
    written = results.load(tmp_path / results.NAME)
    assert [r["family"] for r in written["results"]] == ["toy3", "ncf4"]
    assert written["machine"]["backend"] in written["machine"]["info"]["backends"]
    assert written["machine"]["cores"] > 0
    assert written["settings"]["rounds"] == 2
    assert written["peak_rates"]["float32"] == {"gflops": 100.0, "gbs": 10.0}
    assert written["summary"]["compared"] == 6
    assert "toy3 d=8 B=16 float32" in printed
    assert "2 of 2 cases" in printed


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (["ours"], {"ours"}),
        (["best dense", "floor copy"], {"ours", "best dense", "floor copy"}),
    ],
)
def test_named_contenders_beside_ours(
    wanted: list[str], expected: set[str], tmp_path: Path, console: Console
) -> None:
    words = [*TINY, str(tmp_path), "--rounds", "1", "--contenders", *wanted]
    assert run(words, console)[0] == 0
    for case in results.load(tmp_path / results.NAME)["results"]:
        assert case["contenders"].keys() == expected
        step = case["contenders"]["ours"]["phases"]["step"]
        assert step["samples"] == 1
        assert step["us"] == step["q25"] == step["q75"]


def test_a_suite_leaves_contenders_out(tmp_path: Path, console: Console) -> None:
    """Unless they are named."""
    parsed = parse([*TINY, str(tmp_path), "--device", "cuda"])
    names = {kind.name for kind in command.contenders(parsed, SUITES["gpu-quick"])}
    assert {"ours", "QuACK", "floor gemm"} <= names
    assert not names & {"ours, triton", "ours, torch"}
    parsed.contenders = ["ours, torch"]
    names = {kind.name for kind in command.contenders(parsed, SUITES["gpu-quick"])}
    assert names == {"ours", "ours, torch"}


def test_a_killed_run_loses_nothing_and_resumes(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def measure(case: Case, *_: Any) -> dict[str, Any]:
        if case.family == "ncf4" and not measured.count("again"):
            raise KeyboardInterrupt
        measured.append(case.family)
        return result(case, TIMES)

    monkeypatch.setattr(layer_run, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run([*TINY, str(tmp_path)], console)
    assert cases(tmp_path) == ["toy3"]
    assert results.load(tmp_path / results.NAME)["summary"]["compared"] == 3
    measured.append("again")
    code, printed = run([*TINY, str(tmp_path), "--resume"], console)
    assert code == 0
    assert measured == ["toy3", "again", "ncf4"]
    assert cases(tmp_path) == ["toy3", "ncf4"]
    assert "1 of 2 cases are done already" in printed


def test_resuming_elsewhere_is_refused(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    results.save(tmp_path / results.NAME, document(result(Case("toy3", 8, 16), TIMES)))
    with pytest.raises(DataError, match=r"measured elsewhere .*cpu: a / "):
        run([*TINY, str(tmp_path), "--resume"], console)


def test_skipped_cases_are_written(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(case: Case, *_: Any) -> dict[str, Any]:
        if case.family == "toy3":
            raise Unavailable("too large for [this]")
        return result(case, TIMES)

    monkeypatch.setattr(layer_run, "measure", measure)
    code, printed = run([*TINY, str(tmp_path)], console)
    assert code == 0
    written = results.load(tmp_path / results.NAME)
    assert written["skipped"] == {"toy3 d=8 B=16 float32": "too large for [this]"}
    assert cases(tmp_path) == ["ncf4"]
    assert "skipped: too large for [this]" in printed


def test_a_broken_layer_of_ours_is_an_error(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(case: Case, *_: Any) -> dict[str, Any]:
        made = result(case, TIMES)
        made["contenders"]["ours"] = {"unavailable": "no", "exact": True, "floor": False}
        return made

    monkeypatch.setattr(layer_run, "measure", measure)
    code, printed = run([*TINY, str(tmp_path)], console)
    assert code == 1
    assert "ours did not run" in printed


def test_compare(tmp_path: Path, console: Console) -> None:
    paths = []
    for name, ours in (("old", 100.0), ("new", 150.0)):
        made = document(result(Case("toy3", 8, 4096), TIMES | {"ours": ours}))
        results.save(tmp_path / f"{name}.json", made)
        paths.append(str(tmp_path / f"{name}.json"))
    assert run(["compare", *paths], console)[0] == 1
    assert run(["compare", *paths, "--threshold", "2"], console)[0] == 0
    assert run(["compare", *reversed(paths)], console)[0] == 0


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', "\xff"])
def test_files_that_are_no_results(text: str, tmp_path: Path, console: Console) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"x\.json"):
        run(["compare", str(path), str(path)], console)


def test_train_smoke(tmp_path: Path, console: Console) -> None:
    code, printed = run(["train", "--smoke", "--out", str(tmp_path)], console)
    assert code == 0
    assert "samples/s" in printed
    assert (tmp_path / "movielens_training.json").exists()


def test_shapley_smoke(tmp_path: Path, console: Console) -> None:
    code, printed = run(["shapley", "--smoke", "--out", str(tmp_path)], console)
    assert code == 0
    assert "against the closed form" in printed
    (task,) = json.loads((tmp_path / "shapley_truth.json").read_text("utf-8"))["tasks"]
    ours = task["explainers"][0]
    assert ours["experts"] == 7
    assert {one["rows"] for one in task["explainers"]} == {ours["rows"]}
    assert 0 < ours["rmse"] < 10
    assert 0 < ours["seconds"] < ours["seconds_alone"]
    with pytest.raises(DataError, match="one time for each of --features"):
        run(["shapley", "--features", "3", "--seconds", "1", "2"], console)


def test_explain_smoke(tmp_path: Path, console: Console) -> None:
    code, printed = run(["explain", "--smoke", "--out", str(tmp_path)], console)
    assert code == 0
    assert "Explaining 64 rows by 7 experts" in printed
    document = json.loads((tmp_path / "explanation_cost.json").read_text("utf-8"))
    explained = {one["what"]: one["of_forward"] for one in document["explaining"]}
    assert explained.pop("forward") == 1
    assert set(explained) == {"shapley", "interactions", "moebius", "sufficient"}
    assert min(explained.values()) > 0
    assert {ratio["to"] for ratio in document["training"]["ratios"]} == {
        "ours, selection",
        "paper style",
    }


def test_users_smoke(tmp_path: Path, console: Console) -> None:
    code, printed = run(["users", "--smoke", "--out", str(tmp_path)], console)
    assert code == 0
    assert "Training 8 sessions of users a step" in printed
    document = json.loads((tmp_path / "user_rows.json").read_text("utf-8"))
    found = {(one["users"], one["gradients"]) for one in document["results"]}
    assert found == {(n, f"{k} gradients") for n in (100, 1000) for k in ("sparse", "dense")}
    assert all(0 < one["q25"] <= one["seconds"] <= one["q75"] for one in document["results"])


def test_estimators_smoke(tmp_path: Path, console: Console) -> None:
    reason = "the extra sklearn is not installed"
    pytest.importorskip("maskmoe_kernels.estimators", reason=reason)
    code, printed = run(["estimators", "--smoke", "--out", str(tmp_path)], console)
    assert code == 0
    assert "Estimators on real tables" in printed
    document = json.loads((tmp_path / "estimators.json").read_text("utf-8"))
    assert [fit["model"] for fit in document["fits"]] == ["ours", "HistGradientBoosting", "linear"]
    linear = document["fits"][2]
    assert (linear["rows"], linear["columns"], linear["metric"]) == (178, 13, "accuracy")
    assert linear["score"] > 0.9
    assert all(0 < fit["seconds"] < 60 for fit in document["fits"])


def test_a_summary_of_estimators_compares_the_splits_of_both() -> None:
    scores = {("ours", 0): 0.9, ("ours", 1): 0.8, ("EBM", 0): 0.88, ("linear", 0): 0.7}
    fits = [
        {"table": "t", "model": m, "split": k, "score": score, "seconds": 1 if m == "ours" else 8}
        for (m, k), score in scores.items()
    ]
    (found,) = estimators.summary([*fits, {"table": "t", "model": "EBM", "unavailable": "no"}])
    assert found["models"]["ours"] == {"score": pytest.approx(0.85), "seconds": 1, "splits": 2}
    assert found["gain"] == pytest.approx(0.02, rel=1e-9, abs=0)
    assert found["times_as_fast"] == 8


def test_train_some_networks(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = PeakRates(100.0, 10.0)
    monkeypatch.setattr(mlp_training, "measure_peak_rates", lambda *_, **__: rates)
    words = "train --model mlp --networks toy spotify8 --dtypes bfloat16 --batch 32"
    words += " --rounds 1 --seconds 0 --no-compile --out"
    assert run([*words.split(), str(tmp_path)], console)[0] == 0
    found = json.loads((tmp_path / "mlp_training.json").read_text("utf-8"))["results"]
    assert {(r["network"], r["dtype"], r["rounds"]) for r in found} == {
        ("toy", "bfloat16", 1), ("spotify8", "bfloat16", 1),
    }  # fmt: skip
    assert all(r["steps_a_sample"] == 1 for r in found)


@pytest.mark.parametrize("words", [[], ["train"]], ids=["run", "train"])
def test_a_device_that_is_none(words: list[str], tmp_path: Path, console: Console) -> None:
    with pytest.raises(BackendError, match="--device cuda:99 cannot be used here"):
        run([*words, "--device", "cuda:99", "--out", str(tmp_path)], console)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--suite huge", "invalid choice: 'huge'"),
        ("--families toy4", "invalid choice: 'toy4'"),
        ("--contenders me", "invalid choice: 'me'"),
        ("--rounds 0", "expected a whole number from 1, got '0'"),
        ("--budget nan", "expected a number from 0, got 'nan'"),
        ("compare a.json", "required: SECOND"),
        ("compare a b --threshold 0.5", "expected a number from 1, got '0.5'"),
    ],
)
def test_arguments_that_cannot_be_parsed(
    words: str, message: str, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        command.main(words.split(), console)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_an_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "none.json")
    for words, message in (
        (["compare", missing, missing], "none.json"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["compare", str(tmp_path), missing], "Is a directory; give a bench.json that"),
        (["compare", missing, missing], "No such file or directory; give a bench.json that"),
    ):
        assert command.entry(words) == 2
        text = capsys.readouterr().err
        assert text.startswith("error: ")
        assert text.count("\n") == 1
        assert message in text


def test_ctrl_c_says_how_to_continue(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "main", interrupted)
    assert command.entry([]) == 130
    assert "--resume" in capsys.readouterr().err
    for words in (
        "estimators",
        "flows",
        "shapley",
        "explain",
        "train",
        "overhead",
        "compare a b",
    ):  # cannot continue
        assert command.entry(words.split()) == 130
        assert capsys.readouterr().err == "interrupted\n"


def test_ctrl_c_during_the_imports_is_one_line() -> None:
    # It says when it starts to import torch; what is imported before takes no time.
    code = (
        "import sys, importlib.abc, runpy\n"
        "class Told(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch': print('torch', flush=True)\n"
        "sys.meta_path.insert(0, Told())\n"
        "sys.argv[1:] = ['compare', 'a', 'b']\n"
        "runpy.run_module('bench', run_name='__main__', alter_sys=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "torch\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (130, "interrupted\n")


# --- What is printed ---------------------------------------------------------------------


WORDS = {
    "run": [*TINY[:-1], "--contenders", "best dense", "BSR"],
    "flows": ["flows", "--smoke"],
    "overhead": "overhead --rows 2 --rounds 1 --calls 1 --no-compile".split(),
    "shapley": ["shapley", "--smoke"],
    "explain": ["explain", "--smoke"],
    "posthoc": ["posthoc", "--smoke"],
    "train": ["train", "--smoke", "--no-compile"],
}


@pytest.mark.parametrize("name", WORDS)
def test_a_pipe_gets_a_line_a_record_and_tabs(name: str, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=40)
    assert command.main([*WORDS[name], "--out", str(tmp_path)], console) == 0
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert not set("│┃━└") & set(printed)
    lines = printed.splitlines()
    titles = [k for k, line in enumerate(lines) if line.startswith("# ") and "\t" in lines[k + 1]]
    assert titles
    for k in titles:  # each row has a cell for each column
        columns = lines[k + 1].count("\t")
        assert lines[k + 2].count("\t") == columns > 0
    assert lines[-1].startswith(f"results: {tmp_path}")


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("name", ["run", "train", "shapley", "explain"])
def test_a_narrow_terminal_cuts_no_word(name: str, width: int, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    with chdir(tmp_path):
        assert command.main([*WORDS[name], "--out", "o"], console) == 0
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in printed
    assert max(map(cell_len, printed.splitlines())) <= width


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no full device")
def test_a_full_disk_has_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    results.save(path, document(result(Case("toy3", 8, 4096), TIMES)))
    with Path("/dev/full").open("wb", buffering=0) as full:
        console = Console(file=io.TextIOWrapper(full, write_through=True))
        with pytest.raises(
            OSError, match=r"cannot be written: No space left on device\. Free some"
        ):
            command.main(["compare", str(path), str(path)], console)


# --- What is there already ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["flows", "train", "shapley", "explain"])
def test_results_are_not_replaced_unasked(
    name: str, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*WORDS[name], "--out", str(tmp_path)]
    run(words, console)
    (path,) = tmp_path.iterdir()
    path.write_text("{}")
    with pytest.raises(DataError, match=rf"holds results already \({path.name}\)"):
        run(words, console)
    assert path.read_text() == "{}"
    run([*words, "--overwrite"], console)
    assert path.read_text() != "{}"
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # a folder that is for the smoke alone
        run(WORDS[name], console)


def test_a_run_is_neither_replaced_nor_continued_unasked(tmp_path: Path, console: Console) -> None:
    results.save(tmp_path / results.NAME, document(result(Case("toy3", 8, 16), TIMES)))
    with pytest.raises(DataError, match=r"holds a run already \(bench.json\).*--resume.*--overwri"):
        run([*TINY, str(tmp_path)], console)
    assert run([*TINY, str(tmp_path), "--overwrite"], console)[0] == 0
    assert cases(tmp_path) == ["toy3", "ncf4"]


@pytest.mark.parametrize(
    "name", ["", "compare", "estimators", "train", "flows", "overhead", "shapley", "explain"]
)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command.entry([*name.split(), "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    prefix = f"python -m bench {name}".strip()
    assert text.startswith(f"usage: {prefix} ")
    assert f"example:\n  {prefix} " in text


def test_options_of_a_run_and_of_other_commands() -> None:
    run = parse("--suite full --families toy3 ncf4 --resume".split())
    assert (run.command, run.suite, run.families) == ("run", "full", ["toy3", "ncf4"])
    assert run.resume
    train = parse("train --batch 8 --out there --device cuda".split())
    assert (train.command, train.batch, train.out) == ("train", [8], Path("there"))
    assert (train.device, train.rounds, parse([]).rounds) == ("cuda", 15, None)
    compare = parse("compare a.json b.json --threshold 1.2".split())
    assert (compare.command, compare.threshold, compare.out) == ("compare", 1.2, None)


def test_results_of_earlier_versions_can_be_read(tmp_path: Path, console: Console) -> None:
    """Their names for peak rates and for contenders stay as they were measured."""
    made = document(result(Case("toy3", 8, 4096), {"ours, grouped": 90.0, **TIMES}))
    made["roofs"] = made.pop("peak_rates")
    path = tmp_path / "old.json"
    results.save(path, made)
    read = results.load(path)
    assert "roofs" not in read
    assert read["peak_rates"] == made["roofs"]
    line = line_of(read["results"][0], "step")
    assert line is not None
    assert line.best is not None
    assert line.best.name == "exact"  # our own backend is not a rival
    assert run(["compare", str(path), str(path)], console)[0] == 0


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/bench.json")), ids=lambda p: p.parent.name)
def test_committed_results_name_their_machine_and_can_be_read(path: Path) -> None:
    read = results.load(path)
    assert read["machine"]["cpu"]
    assert read["results"]
    assert summarize(read["results"])["compared"] > 0


def test_peak_rates_are_what_the_machine_does() -> None:
    rates = measure_peak_rates(torch.float32, "cpu", small=True)
    assert 0.1 < rates.gflops < 1e5
    assert 0.1 < rates.gbs < 1e4
