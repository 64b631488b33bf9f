"""Files that are whole or not there: full disks, Ctrl-C, links, kills; damaged checkpoints."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch

from maskmoe_kernels.cli import main
from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.movielens.data import files as movielens_files
from maskmoe_kernels.experiments.movielens.data.reader import read_movielens
from maskmoe_kernels.experiments.shared import plot_style
from maskmoe_kernels.experiments.shared.checkpoint import load_checkpoint
from maskmoe_kernels.experiments.shared.report import read_json, sealed, write_json
from maskmoe_kernels.experiments.skip.data.columns import LOG_COLUMNS
from maskmoe_kernels.experiments.skip.data.csv_file import CsvFile
from maskmoe_kernels.experiments.toy.train import ToyConfig, run_toy
from maskmoe_kernels.files import UNFINISHED, claim, replacing
from tests.experiments.movielens.tiny import write_movielens
from tests.experiments.shared.test_trainer import CONFIG, Problem
from tests.experiments.skip.skip_sessions import ROOT

posix = pytest.mark.skipif(os.name != "posix", reason="as POSIX does it")


def parquet(file: IO[bytes]) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"x": np.random.default_rng(0).random(100_000)}), file)


def picture(file: IO[bytes]) -> None:
    pytest.importorskip("matplotlib")
    figure = plot_style.canvas(10, 10)
    plot_style.module("backends.backend_agg").FigureCanvasAgg(figure)
    figure.subplots().imshow(np.random.default_rng(0).random((300, 300)))
    figure.savefig(file, format="png")


#: Each writes more than 100 kB, by a library that has its own way with errors.
WRITERS: dict[str, Callable[[IO[bytes]], object]] = {
    "torch": lambda file: torch.save({"x": torch.zeros(100_000)}, file),
    "numpy": lambda file: np.save(file, np.zeros(100_000)),
    "parquet": parquet,
    "picture": picture,
    "bytes": lambda file: file.write(bytes(200_000)),
}


def write(path: Path, writer: str) -> None:
    with replacing(path) as file:
        WRITERS[writer](file)


def fail_after(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException) -> None:
    """Have the first write that goes beyond so many bytes fail."""
    write, left = os.write, [count]

    def limited(descriptor: int, data: Any) -> int:
        left[0] -= len(data)
        if left[0] < 0:
            raise error
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", limited)


# --- Writing -----------------------------------------------------------------------------


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_the_old_file_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    error = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        fail_after(patch, 50_000, error)
        with pytest.raises(OSError, match="cannot be written") as caught:
            write(path, writer)
    text = str(caught.value)
    assert text.startswith(f"{path}: cannot be written: no space left on the disk (")
    assert "Free some space" in text
    assert caught.value.errno == errno.ENOSPC
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"x": b"old"}


@pytest.mark.parametrize("writer", WRITERS)
def test_ctrl_c_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        fail_after(patch, 50_000, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            write(path, writer)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"x": b"old"}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_written_is_what_a_plain_file_would_hold(tmp_path: Path, writer: str) -> None:
    write(tmp_path / "x", writer)
    plain = io.BytesIO()
    WRITERS[writer](plain)
    if writer != "torch":  # whose archive numbers its files
        assert (tmp_path / "x").read_bytes() == plain.getvalue()
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@posix
def test_bytes_reach_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    sync, move = os.fsync, os.replace

    def noting(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        calls.append(kind)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), move(a, b)))
    with replacing(tmp_path / "x") as file:
        file.write(b"new")
    assert calls == ["file", "replace", "folder"]


@posix
def test_permissions_and_links(tmp_path: Path) -> None:
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            write_json(tmp_path / f"{mask}.json", {})
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / f"{mask}.json").stat().st_mode) == mode
    (tmp_path / "own").write_text("old")
    (tmp_path / "own").chmod(0o640)
    write_json(tmp_path / "own", {})
    assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o640
    # A link at the end of the path is replaced itself.
    (tmp_path / "other").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    write_json(tmp_path / "link", {})
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "other").read_text() == "kept"


@posix
def test_a_link_under_the_temporary_name_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = iter(["trap", "free"])
    monkeypatch.setattr("secrets.token_hex", lambda size: next(names))
    (tmp_path / "other").write_text("kept")
    (tmp_path / f"{UNFINISHED}trap").symlink_to(tmp_path / "other")
    write_json(tmp_path / "x", {})
    assert (tmp_path / "other").read_text() == "kept"
    assert read_json(tmp_path / "x", "") == {}


@posix
def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path: Path) -> None:
    (tmp_path / f"{UNFINISHED}dead").write_bytes(b"left by a kill")
    (tmp_path / "report.json").write_text("{}")
    with replacing(tmp_path / "x") as file:
        file.write(b"new")
        claim(tmp_path)
        assert len(list(tmp_path.glob(f"{UNFINISHED}*"))) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "x"]


@posix
@pytest.mark.parametrize("out", ["file", "file/under", "a" * 300, "target"])
def test_a_place_that_cannot_be_written_is_named_with_the_reason(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "target").mkdir()
    reason = {
        "file": "expected a folder, got a file",
        "file/under": "a part of this path is a file",
        "target": "there is a folder of this name",
    }.get(out, "the name is too long")
    use = write_json if out == "target" else lambda path, _: claim(path)
    with pytest.raises(OSError, match=f"{out}: cannot be written: {reason}"):
        use(tmp_path / out, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "target"]


def test_every_command_looks_at_its_folder_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "file").write_text("kept")
    out, none = ["--out", str(tmp_path / "file")], str(tmp_path / "none")
    for words in (
        ["toy"],
        ["movielens", "--data", none],
        ["movielens", "explain", "--data", none, "--checkpoint", none, "--user", "1"],
        ["skip", "generate", "--sessions", "9"],
        ["skip", "train", "--data", none],
        ["skip", "evaluate", "--data", none],
        ["skip", "explain", "--data", none, "--run", none],
    ):
        assert main([*words, *out]) == 2
        assert "file: cannot be written: expected a folder, got a file" in capsys.readouterr().err


def test_the_benchmark_looks_at_its_folder_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    words = [sys.executable, "-m", "bench", "--out", str(tmp_path / "file")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "file: cannot be written: expected a folder, got a file" in done.stderr


def test_a_name_that_is_no_text_can_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        (tmp_path / os.fsdecode(b"a\xff")).mkdir()
    except OSError:
        pytest.skip("names are text on this file system")
    write_json(tmp_path / os.fsdecode(b"a\xff") / "x.json", {"name": os.fsdecode(b"a\xff")})
    found = read_json(tmp_path / os.fsdecode(b"a\xff") / "x.json", "")
    assert found == {"name": os.fsdecode(b"a\xff")}


# --- Kills -------------------------------------------------------------------------------

_TOY = """
import sys
from maskmoe_kernels.experiments.toy.train import ToyConfig, run_toy
print("go", flush=True)
while True:
    run_toy("a", 0, sys.argv[1], config=ToyConfig(epochs=1, steps=1, batch=16, test_samples=50))
"""


@pytest.mark.slow
@posix
def test_kills_leave_whole_reports_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    whole, out = tmp_path / "whole", tmp_path / "out"
    config = ToyConfig(epochs=1, steps=1, batch=16, test_samples=50)
    run_toy("a", 0, whole, config=config)
    pictures = {p.name: p.read_bytes() for p in whole.glob("*.png")}
    command = [sys.executable, "-c", _TOY, str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for after in (0.4, 1.3):
        process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for path in out.glob("[a-z]*"):
            if path.suffix == ".png":
                assert path.read_bytes() == pictures[path.name]
            else:
                assert json.loads(path.read_text())["task"] == "a"
    out.mkdir(exist_ok=True)  # a kill may come before the first file
    (out / f"{UNFINISHED}picture").write_bytes(b"left by a kill")
    run_toy("a", 0, out, config=config)
    assert {p.name for p in out.iterdir()} == {*pictures, "report.json"}


# --- Reading -----------------------------------------------------------------------------


def test_a_sealed_object_is_known_again(tmp_path: Path) -> None:
    content = sealed({"a": [1.5, None, "ä"], "b": {"c": True}})
    write_json(tmp_path / "x", content)
    assert read_json(tmp_path / "x", "") == content
    (tmp_path / "x").write_text((tmp_path / "x").read_text("utf-8").replace("1.5", "2.5"), "utf-8")
    with pytest.raises(DataError, match=r"x: expected what its checksum is of.*Do this\."):
        read_json(tmp_path / "x", "Do this.")


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"[]", b'{"a": 1', b""])
def test_what_is_no_json_object(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DataError, match=r"x: expected json|x: expected a json object"):
        read_json(tmp_path / "x", "")


def trained(path: Path) -> dict[str, Any]:
    Problem().fit(path, CONFIG)
    return load_checkpoint(path)


def test_damage_in_the_middle_of_a_tensor_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    value = trained(path)["model"]["0.weight"].numpy().tobytes()
    whole = path.read_bytes()
    at = whole.index(value)
    for damaged in (
        whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],  # one bit of one weight
        whole[:at] + bytes(len(value)) + whole[at + len(value) :],
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"x\.pt: not a readable checkpoint.*checksum"):
            Problem().fit(path, CONFIG, resume=True)


def _set(keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(saved: Any) -> None:
        *path, last = [int(key) if key.isdigit() else key for key in keys.split("/")]
        for key in path:
            saved = saved[key]
        saved[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("model/0.bias", torch.full((6,), torch.nan)), "weight 0.bias, got 6 of 6"),
        (_set("best/model/2.bias", torch.tensor([torch.inf])), "weight 2.bias, got 1 of 1"),
        (_set("model/0.bias", torch.zeros(6).double()), "0.bias to be torch.float32, got .*64"),
        (_set("model/0.bias", torch.zeros(7)), "do not fit this model.*size mismatch for 0.bias"),
        (_set("model/0.bias", 3), "expected model.0.bias to be Tensor, got int 3"),
        (_set("model", torch.zeros(2)), r"expected model to be dict, got a tensor \(2,\)"),
        (_set("epoch", "5"), "expected epoch to be int, got str '5'"),
        (_set("epoch", 4), "expected epoch to be 5 as in its history, got 4"),
        (_set("history", {}), "expected history to be list, got dict"),
        (_set("history/1", {"epoch": 2, "a": torch.nan}), r"history\[1\].a to be a finite number"),
        (_set("best", None), "expected the best of 5 epochs, got none"),
        (_set("best/metrics", {"HR": 0.5}), "expected best.metrics.NDCG@10"),
        (_set("config", [1]), "expected config to be dict, got list"),
        (_set("optimizer", None), "expected optimizer to be dict, got NoneType"),
        (_set("optimizer/state/0/exp_avg", torch.zeros(5)), r"state\.0\.exp_avg to be .*\(6, 4\)"),
        (_set("optimizer/state/9", {}), "state.9 to be of one of 4 parameters"),
        (_set("optimizer/param_groups/0/betas", (0, 1)), r"betas to be \(0.9, 0.999\), got"),
        (_set("optimizer/param_groups/0/lr", "1"), r"lr to be a finite number, got str '1'"),
        (lambda saved: saved.pop("best"), r"expected best, got list \['format'"),
    ],
    ids=lambda of: of if isinstance(of, str) else "",  # a function's address names no test
)
def test_keys_types_and_shapes_that_are_not_ours(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = tmp_path / "x.pt"
    saved = trained(path)
    change(saved)
    torch.save(saved, path)
    with pytest.raises(DataError, match=message) as caught:
        Problem().fit(path, CONFIG, resume=True)
    assert str(path) in str(caught.value)
    assert "--out folder" in str(caught.value)


def test_a_checkpoint_may_not_ask_for_memory_or_code(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    saved = trained(path)
    torch.save({**saved, "extra": bytearray(3)}, path)
    with pytest.raises(DataError, match="it asks for"):
        load_checkpoint(path)
    saved["model"]["0.bias"] = torch.zeros(1).expand(10**9)
    torch.save(saved, path)
    with pytest.raises(DataError, match=r"0\.bias to be stored whole"):
        Problem().fit(path, CONFIG, resume=True)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "y", "w", 8) as new:
        for record in old.namelist():
            new.writestr(record, old.read(record))
    with pytest.raises(DataError, match="records are not those of a checkpoint"):
        load_checkpoint(tmp_path / "y")


# --- Bombs -------------------------------------------------------------------------------


def test_a_zip_bomb_is_refused_by_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    folder = write_movielens(tmp_path / "ml-1m")
    monkeypatch.setattr(movielens_files, "LIMIT", 100_000)
    path = tmp_path / "ml-1m.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("users.dat", "movies.dat"):
            archive.write(folder / name, name)
        archive.writestr("ratings.dat", bytes(1_000_000))
    assert path.stat().st_size < 50_000
    with pytest.raises(DataError, match=r"zip:ratings.dat: .*at most 100,000 bytes.*1,000,000"):
        read_movielens(path)
    # A declaration that lies is cut off there, and its checksum with it.
    told, lie = (size.to_bytes(4, "little") for size in (1_000_000, 10_000))
    path.write_bytes(path.read_bytes().replace(told, lie))
    with pytest.raises(DataError, match="damaged or cut short"):
        read_movielens(path)
    (folder / "ratings.dat").write_bytes(bytes(100_001))
    with pytest.raises(DataError, match=r"ratings.dat: expected at most 100,000"):
        read_movielens(folder)


def test_a_gzip_bomb_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(movielens_files, "LIMIT", 100_000)
    (tmp_path / "x.gz").write_bytes(gzip.compress(bytes(1_000_000)))
    with pytest.raises(DataError, match=r"x.gz: expected at most 100,000 bytes, unpacked"):
        movielens_files.read_packed(tmp_path / "x.gz")
    name = tmp_path / "log_0.csv.gz"
    name.write_bytes(gzip.compress(bytes(1_000_000)))
    with pytest.raises(DataError, match=r"log_0.csv.gz, line 1: expected lines of up to 65,536"):
        list(CsvFile(name, LOG_COLUMNS).blocks())
