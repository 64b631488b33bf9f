"""The ``maskmoe`` command: every subcommand, its exit code, and its one line on an error."""

from __future__ import annotations

import ast
import io
import json
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import maskmoe_kernels as mk
from maskmoe_kernels import cli
from maskmoe_kernels.cli import main
from maskmoe_kernels.experiments.movielens import MODELS
from maskmoe_kernels.experiments.movielens.train import Options
from maskmoe_kernels.experiments.shared import plot_style
from maskmoe_kernels.experiments.shared.denormals import denormals_flushed
from maskmoe_kernels.experiments.toy import train as toy
from maskmoe_kernels.layout.families import FAMILIES
from tests.experiments.movielens.tiny import write_movielens

COMMANDS = (["info"], ["toy"], ["movielens"], ["movielens", "explain"], ["skip"])
SKIP = [["skip", name] for name in ("prepare", "generate", "train", "evaluate", "explain")]
TRAIN = ["--epochs", "1", "--batch-size", "512"]


@pytest.fixture(autouse=True)
def _wide_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("pyarrow", reason="reads MovieLens")
    return write_movielens(tmp_path_factory.mktemp("data") / "ml-1m")


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``maskmoe movielens`` leaves, figures included where matplotlib is there."""
    out = tmp_path_factory.mktemp("out")
    words = ["movielens", "--data", str(folder), "--out", str(out), "--explain", "mixture"]
    assert main([*words, *TRAIN]) == 0
    return out


def error_of(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """The one line on stderr of a command that fails with 2."""
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert "Traceback" not in told
    return told


# --- Help --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], *COMMANDS, *SKIP], ids=" ".join)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*command, "--help"])
    assert left.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: {' '.join(['maskmoe', *command])} ")
    if command:
        assert f"example:\n  maskmoe {' '.join(command)} " in told
    else:
        assert all(" ".join(words) in told for words in [*COMMANDS, ["python", "-m", "bench"]])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert mk.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "COMMAND"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["bench"], "invalid choice: 'bench'"),
        (["toy", "--task", "z", "--out", "x"], "invalid choice: 'z'"),
        (["toy", "--task", "a"], "required: --out"),
        (["toy", "--seed", "-1", "--out", "x"], "expected a whole number in [0, 2^32), got '-1'"),
        (["movielens", "--out", "x"], "required: --data"),
        (["movielens", "--epochs", "0"], "expected a whole number from 1, got '0'"),
        (["movielens", "--batch-size", "1.5"], "expected a whole number from 1, got '1.5'"),
        (["movielens", "--sharpness", "0"], "expected 'auto' or a number above 0, got '0'"),
        (["movielens", "--sharpness", "nan"], "expected 'auto' or a number above 0, got 'nan'"),
        (["movielens", "--max-loss", "2"], "expected a number from 0 to 1, got '2'"),
        (["movielens", "--models", "bert"], "invalid choice: 'bert'"),
        (["movielens", "--data", "x"], "required: --out"),
        (["movielens", "nonsense"], "invalid choice: 'nonsense'"),
        (["movielens", "explain", "--data", "x"], "required: --checkpoint, --user"),
        (["skip"], "COMMAND"),
        (["skip", "train", "--data", "x"], "required: --out"),
        (["skip", "train", "--lr", "-1"], "expected a number above 0, got '-1'"),
        (["skip", "train", "--workers", "-1"], "expected a whole number from 0, got '-1'"),
        (["skip", "train", "--model", "bert"], "invalid choice: 'bert'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_arguments_that_cannot_be_parsed(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


# --- info --------------------------------------------------------------------------------


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    told = capsys.readouterr().out
    for word in (mk.__version__, torch.__version__, *mk.info()["backends"]):
        assert word in told


def test_info_says_why_a_backend_cannot_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {"description": "kernels", "unsupported_reason": "no GPU; pip install x[triton]"}
    monkeypatch.setattr(mk, "info", lambda: {"cuda": None, "backends": {"triton": entry}})
    assert main(["info"]) == 0
    assert "no: no GPU; pip install x[triton]" in capsys.readouterr().out


def test_info_says_whether_a_part_was_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"build": {"cpu": None, "cuda": "no nvcc [here]"}, "cuda": None, "backends": {}}
    monkeypatch.setattr(mk, "info", lambda: facts)
    assert main(["info"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert {"build cpu\tyes", "build cuda\tno: no nvcc [here]", "cuda\tnone"} <= set(told)


@pytest.mark.parametrize(
    ("words", "experts"),
    [("ncf4", 4), ("toy3", 3), ("powerset4", 15), ("user item user+item", 3), ("a+b", 1)],
)
def test_layouts(words: str, experts: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--layout", *words.split()]) == 0
    assert f": {experts} x {experts} blocks, " in capsys.readouterr().out


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_layout_has_a_line_a_row_in_a_terminal_of_any_width(
    name: str, width: int, monkeypatch: Any, capsys: Any
) -> None:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(cli, "open_console", lambda: console)
    assert main(["info", "--layout", name]) == 0
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    rows = [
        found[1].split() for line in lines if (found := re.fullmatch(r".+? +16  ([█░·… ]+)", line))
    ]
    experts = FAMILIES[name]().num_experts
    assert len(rows) == min(experts, 40)
    assert len({len(row) for row in rows}) == 1
    told = f"{experts - len(rows[0]) + 1} of {experts} column blocks are not drawn"
    assert (told in " ".join(lines)) == ("…" in rows[0]) == (len(rows[0]) != experts)


@pytest.mark.parametrize("name", FAMILIES)
def test_layouts_of_the_families_that_the_benchmark_measures(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = FAMILIES[name]().num_experts
    assert main(["info", "--layout", name]) == 0
    assert f": {experts} x {experts} blocks, " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a", "spotify9", "powerset", "powersetx", "Toy3"])
def test_an_unknown_family_is_an_error_that_lists_the_known(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = error_of(capsys, ["info", "--layout", name])
    assert f"unknown family {name!r}; known are " in told
    assert all(known in told for known in (*FAMILIES, "powersetN"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("powerset0", "1 to 8 groups, got 0"),
        ("powerset99", "1 to 8 groups, got 99"),
        ("a+ b", "expected subsets such as a b a+b"),
        ("a a", "may appear once"),
        ("a+b b+a", "inclusion must be an order"),
    ],
)
def test_layouts_that_are_none(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of(capsys, ["info", "--layout", *words.split()])


def test_info_needs_no_extra_and_no_experiment() -> None:
    # Only what declares the commands is there, and packages, which hold no code.
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['matplotlib', 'pyarrow', 'triton']));"
        "from maskmoe_kernels.__main__ import main; code = main(['info']);"
        "light = {'commands', 'arguments', 'denormals', 'output', 'settings', 'train_arguments'};"
        "heavy = [name for name, module in sys.modules.items()"
        " if name.startswith('maskmoe_kernels.experiments')"
        " and not hasattr(module, '__path__') and name.rpartition('.')[2] not in light];"
        "sys.exit(code or ' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- toy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["a", "b", "c"])
def test_toy(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plot_style, "unsupported_reason", lambda: "matplotlib is not installed")
    small = partial(toy.ToyConfig, steps=5, test_samples=200)
    monkeypatch.setattr(toy, "ToyConfig", small)
    words = ["toy", "--task", task, "--epochs", "1", "--seed", "3", "--out", str(tmp_path / "x")]
    assert main(words) == 0
    report = json.loads((tmp_path / "x" / "report.json").read_text("utf-8"))
    assert (report["task"], report["seed"], report["config"]["epochs"]) == (task, 3, 1)
    told = capsys.readouterr().out
    assert "accuracy" in told
    assert "no figures: matplotlib is not installed" in told


def test_a_device_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("nonsense", "meta", "cuda:99"):
        told = error_of(capsys, ["toy", "--device", device, "--out", str(tmp_path)])
        assert f"--device {device} cannot be used here: " in told


def test_out_that_is_a_file(tmp_path: Path, folder: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    words = ["movielens", "--data", str(folder), "--out", str(tmp_path / "file"), *TRAIN]
    assert "file" in error_of(capsys, [*words, "--models", "content"])


def test_out_where_no_folder_can_be_made(capsys: Any) -> None:
    told = error_of(capsys, ["toy", "--out", "/proc/x"])
    assert told == (
        "error: --out /proc/x: cannot be written: no folder can be made there. Name another "
        "folder, or give leave to write to this one.\n"
    )


HINT = "matplotlib, which draws the figures, is not installed. Run: pip install "
PLOT = f'{HINT}"maskmoe_kernels[plot]"'
DATA = 'which is not installed. Run: pip install "maskmoe_kernels[data]"\n'


def test_toy_twice_without_matplotlib(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(toy, "ToyConfig", partial(toy.ToyConfig, steps=5, test_samples=200))
    words = ["toy", "--epochs", "1", "--out", str(tmp_path)]
    for flags in ([], ["--overwrite"]):
        assert main([*words, *flags]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[-2:] == [f"report: {tmp_path}", f"no figures: {PLOT}"]
    before = (tmp_path / "report.json").read_bytes()
    told = error_of(capsys, [*words, "--seed", "1"])
    assert "holds results already (report.json). Give --overwrite to start again" in told
    assert (tmp_path / "report.json").read_bytes() == before


def test_the_hints_about_pyarrow_are_whole(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for words in ("train --data d --out o", "generate --sessions 9 --out o", "prepare d --out o",
                  "evaluate --data d --out o", "explain --data d --run r"):  # fmt: skip
        told = error_of(capsys, ["skip", *words.split()])
        assert told == f"error: sessions are read and written with pyarrow, {DATA}"


@pytest.mark.parametrize("delay", [0.3, 0.8])
def test_ctrl_c_during_the_imports_is_one_line(delay: float) -> None:
    # It says when it starts to import torch; what is imported before takes no time.
    code = (
        "import sys, importlib.abc\n"
        "class Told(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch': print('torch', flush=True)\n"
        "sys.meta_path.insert(0, Told())\n"
        "sys.argv[0] = '/somewhere/maskmoe'\n"
        "from maskmoe_kernels.cli import main\n"
        "sys.exit(main(['info']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "torch\n"
    time.sleep(delay / 10)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (130, "interrupted\n")


# --- movielens ---------------------------------------------------------------------------


def test_movielens(trained: Path) -> None:
    report = json.loads((trained / "report.json").read_text("utf-8"))
    assert list(report["models"]) == list(MODELS["mixture"])
    assert sorted(path.name for path in trained.glob("*.pt")) == [
        "black-box.pt", "content.pt", "interpretable.pt"
    ]  # fmt: skip
    if plot_style.unsupported_reason() is None:
        names = {path.name for path in trained.glob("*.png")}
        assert {"learning_curves.png", "attribution.png", "frontier.png", "hasse.png"} <= names


def test_resume(trained: Path, folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(plot_style, "unsupported_reason", lambda: "not now")
    for path in trained.glob("*.pt"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    words = ["movielens", "--data", str(folder), "--out", str(tmp_path), "--resume"]
    words += ["--explain", "mixture"]
    assert main([*words, *TRAIN, "--sharpness", "2"]) == 0
    assert "going on after epoch 1" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert report["models"]["interpretable"]["sharpness"] == 2
    assert report["options"]["sharpness"] == 2
    told = error_of(capsys, [*words, *TRAIN, "--seed", "1"])
    assert "was trained with seed=0, this run has 1" in told


def test_a_run_is_neither_replaced_nor_continued_unasked(
    trained: Path, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    for path in [*trained.glob("*.pt"), trained / "report.json"]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    words = ["movielens", "--data", str(folder), "--out", str(tmp_path), *TRAIN]
    told = error_of(capsys, words)
    assert "Give --resume to continue that run, --overwrite to start again" in told
    told = error_of(capsys, [*words, "--resume", "--batch-size", "9"])
    assert "was trained with batch_size=512, this run has 9" in told
    assert "--overwrite" in told
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_lines_of_training_say_that_metrics_are_of_validation(
    folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(plot_style, "unsupported_reason", lambda: "not now")
    words = ["movielens", "--data", str(folder), "--out", str(tmp_path), *TRAIN]
    assert main([*words, "--models", "content"]) == 0
    lines = capsys.readouterr().out.splitlines()
    [record] = [line for line in lines if line.startswith("content: epoch 1/1")]
    names = [field.rpartition(" ")[0] for field in record.split("\t")]
    assert names[1:4] == ["training loss", "validation HR@10", "validation NDCG@10"]
    assert lines[0].startswith("most popular movies\ttest HR@10 ")
    assert not any("\x1b" in line for line in lines)


def test_a_checkpoint_of_another_experiment_names_its_command(
    trained: Path, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    saved = torch.load(trained / "content.pt", weights_only=True)
    saved["config"] = {**saved["config"], "experiment": "skip"}
    torch.save(saved, tmp_path / "checkpoint.pt")
    words = ["movielens", "explain", "--data", str(folder), "--user", "1", "--checkpoint"]
    told = error_of(capsys, [*words, str(tmp_path / "checkpoint.pt")])
    assert "is a checkpoint of `maskmoe skip`, expected one of `maskmoe movielens`; " in told
    assert f"`maskmoe skip explain --run {tmp_path}` reads it" in told
    for run in (trained, trained / "interpretable.pt"):
        told = error_of(capsys, ["skip", "explain", "--data", "d", "--run", str(run)])
        assert "is a checkpoint of `maskmoe movielens`" in told
        assert "`maskmoe movielens explain --checkpoint " in told


def test_negatives_of_a_file(folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(plot_style, "unsupported_reason", lambda: "not now")
    words = ["movielens", "--data", str(folder), "--out", str(tmp_path), "--models", "content"]
    wrong = tmp_path / "negatives.tsv"
    wrong.write_text("(1,101)\t102\n")
    told = error_of(capsys, [*words, *TRAIN, "--negatives", str(wrong)])
    assert "negatives.tsv, line 1" in told


def test_every_option_arrives(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    got: list[Any] = []
    monkeypatch.setattr(
        "maskmoe_kernels.experiments.movielens.train.run_movielens", lambda *args: got.extend(args)
    )
    words = (
        "movielens --data d --negatives n --models content black-box content --epochs 7 "
        "--patience 3 --batch-size 9 --seed 5 --embeddings strict --widths largest --device cpu "
        "--resume --sharpness 2.5 --max-loss 0.02 --out o"
    )
    assert main(words.split()) == 0
    models = ("content", "black-box")
    expected = Options(models, 7, 3, 9, 5, "strict", "largest", "cpu", True, 2.5, 0.02)
    assert got[:4] == [Path("d"), Path("o"), expected, Path("n")]
    got.clear()
    assert main("movielens --data d --out o --sharpness auto".split()) == 0
    assert got[:4] == [Path("d"), Path("o"), Options(), None]
    told = error_of(capsys, "movielens --data d --out o --sharpness 2".split())
    assert "--sharpness 2 is of the paper's mixture" in told
    assert "give --explain mixture" in told
    for how, model in (("mixture", "interpretable"), ("sufficient", "sufficient")):
        got.clear()
        assert main(f"movielens --data d --out o --explain {how}".split()) == 0
        assert got[2] == Options(("content", "black-box", model))
    assert Options().models == got[2].models


def test_bad_data_is_one_line(tmp_path: Path, folder: Path, capsys: Any) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert "none.zip" in error_of(capsys, ["movielens", "--data", str(tmp_path / "none.zip"), *out])
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in folder.iterdir():
        (bad / path.name).write_bytes(path.read_bytes().replace(b"\n4::M::", b"\n4::X::"))
    assert "users.dat, line 4" in error_of(capsys, ["movielens", "--data", str(bad), *out, *TRAIN])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("command", "hint"), [("movielens --data d", True), ("toy", False)])
def test_ctrl_c(command: str, hint: bool, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    for name in ("movielens.train.run_movielens", "toy.train.run_toy"):
        monkeypatch.setattr(f"maskmoe_kernels.experiments.{name}", interrupted)
    assert main([*command.split(), "--out", str(tmp_path)]) == 130
    told = capsys.readouterr().err
    assert told.startswith("interrupted")
    assert ("--resume" in told) is hint


def test_training_that_diverges(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def diverged(*args: Any) -> None:
        raise FloatingPointError("content: the loss is no longer finite\nin epoch 3")

    monkeypatch.setattr("maskmoe_kernels.experiments.movielens.train.run_movielens", diverged)
    words = ["movielens", "--data", "d", "--out", str(tmp_path)]
    assert error_of(capsys, words) == "error: content: the loss is no longer finite in epoch 3\n"


# --- movielens explain -------------------------------------------------------------------


def test_explain(trained: Path, folder: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["movielens", "explain", "--data", str(folder), "--checkpoint"]
    words += [str(trained / "interpretable.pt"), "--user", "2"]
    assert main([*words, "--top", "3", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "User 2 is a man, aged 18-24" in told
    assert "chosen in report.json" in told
    written = json.loads((tmp_path / "explain-user-2.json").read_text("utf-8"))
    assert [movie["rank"] for movie in written["movies"]] == [1, 2, 3]
    assert main([*words, "--item", "241", "--sharpness", "1"]) == 0
    assert "Never Seen [sic] (2000)" in capsys.readouterr().out


def test_explain_says_what_is_wrong(trained: Path, folder: Path, capsys: Any) -> None:
    words = ["movielens", "explain", "--data", str(folder)]
    good = ["--checkpoint", str(trained / "interpretable.pt")]
    assert "from 1 to 35" in error_of(capsys, [*words, *good, "--user", "99"])
    assert "from 101 to 241" in error_of(capsys, [*words, *good, "--user", "1", "--item", "1"])
    other = ["--checkpoint", str(trained / "content.pt"), "--user", "1"]
    assert "holds the 'content' model" in error_of(capsys, [*words, *other])
    none = ["--checkpoint", str(trained / "none.pt"), "--user", "1"]
    assert "no such checkpoint" in error_of(capsys, [*words, *none])
    given = error_of(capsys, [*words, *good, "--user", "1", "--tolerance", "1"])
    assert "give --sharpness, or sufficient.pt" in given


# --- skip --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("prepare none --out o", "none: expected a file or a folder, got nothing there"),
        ("generate --sessions 5 --tracks 9 --out o", "tracks must be at least 2000, got 9"),
        ("train --data none --out o", "expected the manifest of prepared shards"),
        ("train --data none --out o --device cuda:99", "--device cuda:99 cannot be used here"),
        ("evaluate --data none --out o", "expected the manifest of prepared shards"),
        ("evaluate --data none --runs none --out o", "no such checkpoint; train a model first"),
        ("explain --data none --run none", "no such checkpoint; train a model first"),
    ],
)
def test_skip_is_one_line_on_an_error(
    words: str, message: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    pytest.importorskip("pyarrow", reason="reads sessions")
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, ["skip", *words.split()])
    assert not list(tmp_path.glob("o/*"))


def test_skip_without_pyarrow(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for words in ("train --data d --out o", "generate --sessions 9 --out o"):
        assert "[data]" in error_of(capsys, ["skip", *words.split()])


# --- What the command leaves alone -------------------------------------------------------


def test_the_package_does_not_import_the_benchmark() -> None:
    names = re.compile(r"bench(\.\w+)*")
    for path in Path(mk.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            match node:
                case ast.Import(names=aliases):
                    assert not any(names.fullmatch(alias.name) for alias in aliases), path
                case ast.ImportFrom(module=str(module), level=0):
                    assert not names.fullmatch(module), path
                case ast.Constant(value=str(text)):  # for importlib
                    assert not names.fullmatch(text), path
                case ast.Attribute(value=ast.Name(id="sys"), attr="path"):
                    pytest.fail(f"{path} looks at sys.path")


def test_denormals_are_flushed_in_a_command_and_as_before_after_it(monkeypatch):
    # Made from bits: a conversion would flush them already.
    tiny = torch.tensor(71362, dtype=torch.int32).view(torch.float32)

    def flushes():
        return int((tiny * 1).view(torch.int32)) == 0

    seen = []
    monkeypatch.setattr(cli, "_info", lambda *args: seen.append(flushes()))
    before = flushes()
    assert main(["info"]) == 0
    assert seen == [True]
    assert flushes() == before
    with denormals_flushed():
        assert main(["info"]) == 0
        assert flushes()  # whoever asked for it keeps it
    assert flushes() == before
