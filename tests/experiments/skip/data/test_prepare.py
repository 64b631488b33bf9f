"""From csv files to shards: every value, repeated and interrupted runs, several processes."""

from __future__ import annotations

import gzip
import io
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.report import write_json
from maskmoe_kernels.experiments.skip.data.columns import LOG_COLUMNS
from maskmoe_kernels.experiments.skip.data.prepare import Prepared, find_sources, prepare
from maskmoe_kernels.experiments.skip.data.sessions import SessionDataset
from maskmoe_kernels.experiments.skip.data.shards import Shards
from tests.experiments.skip.data.files import (
    HEADER,
    SESSIONS,
    contents,
    edit,
    end_of_first_session,
    manifest,
    put,
    read_csv,
    rows_of,
)


def test_every_value_arrives(source: Path, tmp_path: Path) -> None:
    found = prepare([source], tmp_path, strict=True, row_group=7)
    assert found == Prepared(2_000, found.sessions, 0, {}, {})
    assert sum(found.sessions.values()) == SESSIONS
    ids = pq.read_table(tmp_path / "tracks" / "tracks.parquet")["track_id"].to_pylist()
    column = {c.name: c for c in LOG_COLUMNS}
    given = {
        (row["session_id"], int(row["session_position"])): row
        for k in (0, 1)
        for row in read_csv(source / f"log_{k}.csv")
    }
    rows = rows_of(tmp_path)
    assert len(rows) == len(given)
    for row in rows:
        text = given.pop((row["session_id"], row["session_position"]))
        for name in HEADER:
            if name == "track_id_clean":
                assert ids[row["track"]] == text[name]
            elif column[name].kind == "flag":
                assert text[name] == ("true" if row[name] else "false")
            elif column[name].kind == "name":
                assert column[name].names[row[name]] == text[name]
            else:
                assert (
                    str(int(row[name]) if row[name] in (True, False) else row[name]) == text[name]
                )
    assert not given


def test_both_spellings_gzip_and_any_column_order(source: Path, tmp_path: Path) -> None:
    prepare([source / "log_0.csv", source / "tf_0.csv"], tmp_path / "plain")
    rows = read_csv(source / "log_0.csv")
    order = [*reversed(HEADER), "extra"]
    for row in rows:
        year, month, day = row["date"].split("-")
        row["date"] = f"{day}-{month}-{year[2:]}"
        row["extra"] = "x"
        row.update({n: row[n].capitalize() for n in row if row[n] in ("true", "false")})
    text = "\r\n".join([",".join(order), *(",".join(r[n] for n in order) for r in rows), ""])
    (tmp_path / "log_0.csv.gz").write_bytes(gzip.compress(text.encode()))
    prepare([tmp_path / "log_0.csv.gz", source / "tf_0.csv"], tmp_path / "other", strict=True)
    assert contents(tmp_path / "plain") == contents(tmp_path / "other")


def test_one_bad_value_changes_no_other_row(folder: Path, tmp_path: Path) -> None:
    prepare([folder], tmp_path / "whole")
    first = read_csv(folder / "log_0.csv")[0]["session_id"]
    edit(folder / "log_0.csv", put(3, "skip_1", "maybe"))
    prepare([folder], tmp_path / "damaged")
    left = [row for row in rows_of(tmp_path / "whole") if row["session_id"] != first]
    assert rows_of(tmp_path / "damaged") == left


def test_duplicate_session_in_another_file(folder: Path, tmp_path: Path) -> None:
    end = end_of_first_session(folder / "log_0.csv")
    shutil.copy(folder / "log_0.csv", folder / "log_1.csv")

    def rename(table: list[list[str]]) -> None:
        for row in table[end:]:
            row[0] = "1" + row[0][1:]

    edit(folder / "log_1.csv", rename)
    found = prepare([folder], tmp_path / "out")
    assert (found.counts, found.dropped) == ({"duplicate session": 1}, 1)
    ids = [row["session_id"] for row in rows_of(tmp_path / "out") if row["session_position"] == 1]
    assert len(ids) == len(set(ids)) == sum(found.sessions.values()) == 119
    message = r"log_1\.csv, line 2: expected each session once, .*got one that log_0 holds too"
    with pytest.raises(DataError, match=message):
        prepare([folder], tmp_path / "out", strict=True)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_sources(folder: Path, tmp_path: Path) -> None:
    assert find_sources(folder) == ([folder / "log_0.csv"], [folder / "tf_0.csv"])
    with pytest.raises(DataError, match=r"nowhere: expected a file or a folder, got nothing"):
        find_sources(folder / "nowhere")
    with pytest.raises(DataError, match=r"expected a tf_\*\.csv \(or \.csv\.gz\), got none"):
        find_sources(folder / "log_0.csv")
    (folder / "more").mkdir()
    shutil.copy(folder / "log_0.csv", folder / "more" / "log_0.csv")
    with pytest.raises(DataError, match=r"log files of different names, .* got log_0 twice"):
        find_sources(folder)


def test_finished_files_are_not_made_again(source: Path, tmp_path: Path) -> None:
    inputs, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(source, inputs)
    first = prepare([inputs], out)
    made = {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")}
    assert prepare([inputs], out) == first
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")} == made
    lines = (inputs / "log_1.csv").read_text().splitlines(keepends=True)
    end = end_of_first_session(inputs / "log_1.csv")
    (inputs / "log_1.csv").write_text("".join(lines[:1] + lines[end:]))
    assert sum(prepare([inputs], out).sessions.values()) == SESSIONS - 1
    for path, time in made.items():
        assert (path.stat().st_mtime_ns == time) == ("log_1" not in path.name)


@pytest.mark.parametrize("place", ["tracks.json", "log_0.json", "manifest.json", "shard"])
def test_an_interrupted_run_is_completed(
    source: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare([source], tmp_path / "whole")
    out = tmp_path / "out"
    target = "maskmoe_kernels.experiments.skip.data."

    def stop(path: Path, *args: object, **kwargs: object) -> None:
        if Path(path).name == place:
            raise KeyboardInterrupt
        write_json(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        if place == "shard":
            writer, count = pq.ParquetWriter.write_table, iter(range(9))

            def die(self: object, *args: object, **kwargs: object) -> None:
                if next(count) == 2:
                    raise KeyboardInterrupt
                writer(self, *args, **kwargs)

            patch.setattr(pq.ParquetWriter, "write_table", die)
        else:
            for module in ("manifest", "records", "tracks"):
                patch.setattr(target + module + ".write_json", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare([source], out)
    assert not (out / "manifest.json").exists()
    (out / "train").mkdir(exist_ok=True)
    (out / "train" / ".unfinished-log_0.parquet").write_bytes(b"left by a kill")
    prepare([source], out)
    assert contents(out) == contents(tmp_path / "whole")
    assert manifest(out) == manifest(tmp_path / "whole")


def test_damaged_shard_is_made_again(source: Path, tmp_path: Path) -> None:
    prepare([source], tmp_path)
    whole = contents(tmp_path)
    (tmp_path / "train" / "log_1.parquet").write_bytes(b"")
    prepare([source], tmp_path)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("name", ["train/log_1.parquet", "tracks/features.npy", "logs/log_0.npy"])
def test_a_flipped_bit_is_found_and_made_good(source: Path, tmp_path: Path, name: str) -> None:
    prepare([source], tmp_path)
    whole = contents(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(data)
    if not name.startswith("logs"):  # which only prepare reads
        shards = Shards(tmp_path, "train")
        with pytest.raises(DataError, match=f"{Path(name).name}.*Run `maskmoe skip prepare` again"):
            list(SessionDataset(shards, 64))
    prepare([source], tmp_path)
    assert contents(tmp_path) == whole


def test_session_comes_back_when_its_other_file_goes(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "log_0.csv", folder / "log_1.csv")
    found = prepare([folder], tmp_path / "out")
    assert (found.dropped, found.counts) == (60, {"duplicate session": 60})
    (folder / "log_0.csv").unlink()
    found = prepare([folder], tmp_path / "out")
    assert (found.dropped, sum(found.sessions.values())) == (0, 60)


def test_processes_write_the_same(source: Path, tmp_path: Path) -> None:
    one = prepare([source], tmp_path / "one")
    terminal = Console(file=io.StringIO(), force_terminal=True)
    two = prepare([source], tmp_path / "two", workers=2, console=terminal)
    assert one == two
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert manifest(tmp_path / "one") == manifest(tmp_path / "two")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("quick_processes")
def test_a_pipe_gets_a_line_now_and_then(
    source: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskmoe_kernels.experiments.shared.progress._INTERVAL", 0.0)
    console = Console(file=io.StringIO(), width=20)
    prepare([source], tmp_path, workers=workers, console=console)
    assert isinstance(console.file, io.StringIO)
    last = {}
    for line in console.file.getvalue().splitlines():
        name, done, of, total, unit = line.split()
        assert (of, unit) == ("of", "MB")
        last[name.rstrip(":")] = done, total
    assert list(last) == ["tracks", "log_0", "log_1"]
    assert all(done == total for done, total in last.values())
    mb = sum((source / f"log_{k}.csv").stat().st_size for k in (0, 1)) / 1e6
    assert sum(float(last[f"log_{k}"][1]) for k in (0, 1)) == pytest.approx(mb, rel=0, abs=0.1)


@pytest.mark.usefixtures("quick_processes")
def test_error_in_a_process_arrives(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "in")
    edit(tmp_path / "in" / "log_1.csv", put(2, "date", "never"))
    with pytest.raises(DataError, match=r"log_1\.csv, line 2: expected a date .* got 'never'"):
        prepare([tmp_path / "in"], tmp_path / "out", workers=2, strict=True)


def test_other_arguments(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at least 1, got 0, 2048"):
        prepare([source], tmp_path, workers=0)


def test_real_sessions(shared_data: Path, tmp_path: Path) -> None:
    found = prepare([shared_data / "mssd-sample"], tmp_path, strict=True)
    assert (found.tracks, sum(found.sessions.values()), found.counts) == (175, 11, {})
    rows = rows_of(tmp_path)
    assert len(rows) == 201
    assert sum(row["skip_2"] for row in rows) == 82
    assert sum(row["premium"] for row in rows) == 181
    assert sorted({str(row["date"]) for row in rows}) == ["2018-07-14", "2018-07-15"]
