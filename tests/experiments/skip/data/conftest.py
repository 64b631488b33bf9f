"""Generated csv files, and the shards that are prepared from them."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from maskmoe_kernels.experiments.skip.data.shards import Shards
from maskmoe_kernels.experiments.skip.generator.generate import generate
from maskmoe_kernels.experiments.skip.generator.settings import GeneratorSettings
from tests.experiments.skip.data.files import SESSIONS


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated csv files: 120 sessions in two log files."""
    folder = tmp_path_factory.mktemp("generated")
    generate(folder, GeneratorSettings(SESSIONS, seed=3, tracks=2_000, chunk=60))
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A copy to damage: one log file of 60 sessions."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("log_0.csv", "tf_0.csv"):
        shutil.copy(source / name, copy / name)
    return copy


@pytest.fixture(scope="session")
def shards(data: Path) -> Shards:
    """The shards of training: 9 row groups of up to 32 sessions."""
    return Shards(data, "train")


@pytest.fixture(scope="session")
def rows(data: Path) -> dict[str, list[dict]]:
    """Session id -> its rows, from the shards of training."""
    found: dict[str, list[dict]] = {}
    for path in sorted((data / "train").glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            found.setdefault(row["session_id"], []).append(row)
    return found


@pytest.fixture
def quick_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes forked from one that has imported torch already, instead of spawned ones."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["maskmoe_kernels.experiments.skip.data.prepare"])
    monkeypatch.setattr(multiprocessing, "get_context", lambda method=None: context)
