"""The files of generated sessions: the same for the same settings, in any number of runs."""

from __future__ import annotations

import io
import json
import multiprocessing
from pathlib import Path

import pytest
from rich.console import Console

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.skip.generator.chunk import draw_chunk
from maskmoe_kernels.experiments.skip.generator.generate import generate
from maskmoe_kernels.experiments.skip.generator.settings import GeneratorSettings


def test_files_depend_on_the_settings_alone(tmp_path: Path) -> None:
    settings = GeneratorSettings(90, seed=2, tracks=2_000, chunk=40)
    generate(tmp_path / "one", settings)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == [
        "causes_0.parquet", "causes_1.parquet", "causes_2.parquet", "generation.json",
        "log_0.csv", "log_1.csv", "log_2.csv", "tf_0.csv",
    ]  # fmt: skip
    # Interrupted after two chunks, and taken up again.
    generate(tmp_path / "two", settings)
    (tmp_path / "two" / "log_1.csv").unlink()
    (tmp_path / "two" / ".unfinished-log_1.csv").write_text("left by a kill")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "two").glob("log_*")}
    generate(tmp_path / "two", settings)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    logs = [(tmp_path / "one" / f"log_{k}.csv").read_text() for k in range(3)]
    assert [text.count(",1,") > 0 for text in logs] == [True] * 3
    sessions = {line.split(",")[0] for text in logs for line in text.splitlines()[1:]}
    assert len(sessions) == 90
    other, _ = draw_chunk(GeneratorSettings(90, seed=3, tracks=2_000, chunk=40), 0)
    assert not sessions & set(other["session_id"].to_pylist())


@pytest.fixture
def quick_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes forked from one that has imported torch already, instead of spawned ones."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["maskmoe_kernels.experiments.skip.generator.generate"])
    monkeypatch.setattr(multiprocessing, "get_context", lambda method=None: context)


@pytest.mark.usefixtures("quick_processes")
def test_processes_write_the_same(tmp_path: Path) -> None:
    settings = GeneratorSettings(60, tracks=2_000, chunk=30)
    generate(tmp_path / "one", settings)
    generate(tmp_path / "two", settings, workers=2, console=Console(file=io.StringIO()))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_folder_of_other_sessions_is_refused(tmp_path: Path) -> None:
    settings = GeneratorSettings(20, tracks=2_000)
    generate(tmp_path, settings)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        DataError, match=r"generation\.json: expected .*'seed': 1.* got .*'seed': 0"
    ):
        generate(tmp_path, GeneratorSettings(20, seed=1, tracks=2_000))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "generation.json").unlink()
    with pytest.raises(DataError, match=r"unknown origin, got \['causes_0\.parquet', 'log_0\.csv'"):
        generate(tmp_path, settings)
    for bad, message in (
        ({"sessions": 0}, "at least 1 and seed at least 0, got 0"),
        ({"sessions": 1, "tracks": 9}, "tracks must be at least 2000, got 9"),
    ):
        with pytest.raises(ValueError, match=message):
            GeneratorSettings(**bad)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        generate(tmp_path / "new", settings, workers=0)


def test_settings_are_written_down(tmp_path: Path) -> None:
    generate(tmp_path, GeneratorSettings(10, seed=9, tracks=2_000, chunk=10))
    found = json.loads((tmp_path / "generation.json").read_text())
    assert found == {"sessions": 10, "seed": 9, "tracks": 2_000, "chunk": 10}
