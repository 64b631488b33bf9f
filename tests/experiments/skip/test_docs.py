"""What docs/sessions.md says is run as it stands there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from maskmoe_kernels.cli import main

pytest.importorskip("duckdb")
PAGE = Path(__file__).resolve().parents[3] / "docs" / "sessions.md"


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def write_ratings(folder: Path, users: int = 40, films: int = 60) -> None:
    """A table in the official layout, small."""
    folder.mkdir()
    genres = ("Action", "Comedy|Drama", "Film-Noir", "Children's|War")
    ratings = [
        f"{user}::{1 + (7 * user + 3 * k) % films}::{1 + (user * k) % 5}::{9 * 10**8 + 50 * k}"
        for user in range(1, users + 1)
        for k in range(12 + user % 15)
    ]
    people = [
        f"{u}::{'FM'[u % 2]}::{(18, 25, 56)[u % 3]}::{u % 21}::1" for u in range(1, users + 1)
    ]
    shown = [f"{m}::Film {m} (19{30 + m})::{genres[m % 4]}" for m in range(1, films + 1)]
    for name, lines in (("ratings", ratings), ("users", people), ("movies", shown)):
        (folder / f"{name}.dat").write_text("\n".join(lines) + "\n", "latin-1")


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_ratings(tmp_path / "ml-1m")
    run(tmp_path)
    report = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert set(report["models"]) == {"last", "mean", "interpretable-gru", "black-box-gru"}
    assert report["models"]["interpretable-gru"]["family"]["groups"]["who"] == 8
    assert len(list((tmp_path / "report").glob("explain-*-sums.png"))) == 1


@pytest.mark.deep
def test_the_page_runs_on_the_real_table(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zipfile

    with zipfile.ZipFile(shared_data / "ml-1m" / "ml-1m.zip") as archive:
        archive.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    run(tmp_path)
    assert json.loads((tmp_path / "report" / "evaluation.json").read_text())["sessions"] > 500


def run(folder: Path) -> None:
    (code,), (schema,), (commands,) = (blocks(kind) for kind in ("python", "toml", "bash"))
    exec(compile(code, "sessions.md", "exec"), {})
    (folder / "ratings.toml").write_text(schema)
    for line in commands.splitlines():
        name, *words = line.split()
        assert name == "maskmoe"
        assert main(words) == 0, line
