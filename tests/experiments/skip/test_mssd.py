"""The reader of the Music Streaming Sessions Dataset, on generated files, whole and damaged."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.report import write_json
from maskmoe_kernels.experiments.skip.data import mssd_csv, mssd_tracks
from maskmoe_kernels.experiments.skip.data.generator import Settings, generate
from maskmoe_kernels.experiments.skip.data.mssd import Prepared, find_sources, prepare
from maskmoe_kernels.experiments.skip.data.mssd_columns import (
    LOG_COLUMNS,
    TRACK_FEATURES,
    hash_ids,
    parse_date,
)
from maskmoe_kernels.experiments.skip.data.mssd_shards import SPLITS, split_of
from maskmoe_kernels.experiments.skip.data.sessions import SessionDataset, Shards

SESSIONS = 120
HEADER = [column.name for column in LOG_COLUMNS]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated")
    generate(folder, Settings(SESSIONS, seed=3, tracks=2_000, chunk=60))
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A copy to damage: one log file of 60 sessions."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("log_0.csv", "tf_0.csv"):
        shutil.copy(source / name, copy / name)
    return copy


def rows_of(out: Path) -> list[dict]:
    """All rows of all shards, in order of split, file and row group."""
    names = [shard["file"] for split in SPLITS for shard in manifest(out)["splits"][split]]
    return [row for name in names for row in pq.read_table(out / name).to_pylist()]


def manifest(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_text())


def read_csv(path: Path) -> list[dict]:
    lines = path.read_text().splitlines()
    return [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]


def contents(out: Path) -> dict[str, bytes]:
    """What was written, but for the times of the sources."""
    skip = {".json"}
    files = [p for p in sorted(out.rglob("*")) if p.is_file() and p.suffix not in skip]
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


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


def test_row_groups_hold_whole_sessions(source: Path, tmp_path: Path) -> None:
    prepare([source], tmp_path, row_group=7)
    for split, shards in manifest(tmp_path)["splits"].items():
        for shard in shards:
            file = pq.ParquetFile(tmp_path / shard["file"])
            assert file.num_row_groups == len(shard["row_groups"])
            assert all(size == 7 for size in shard["row_groups"][:-1])
            for i, size in enumerate(shard["row_groups"]):
                table = file.read_row_group(i)
                digest = hash_ids(table["session_id"])
                assert len(np.unique(digest)) == size
                assert {SPLITS[k] for k in split_of(digest)} == {split}
                lengths = table["session_length"].to_numpy()
                assert lengths[table["session_position"].to_numpy() == 1].sum() == len(table)


def test_split_is_80_10_10() -> None:
    share = np.bincount(split_of(hash_ids([f"0_{i}" for i in range(100_000)]))) / 100_000
    assert np.abs(share - [0.8, 0.1, 0.1]).max() < 0.005  # more than 4 deviations


def test_blocks_do_not_show(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare([source], tmp_path / "one", row_group=7)
    blocks = mssd_csv.CsvFile.blocks
    monkeypatch.setattr(mssd_csv.CsvFile, "blocks", lambda self: blocks(self, 9_999))
    prepare([source], tmp_path / "many", row_group=7)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


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


def test_track_statistics(source: Path, tmp_path: Path) -> None:
    prepare([source], tmp_path)
    statistics = manifest(tmp_path)["statistics"]
    assert list(statistics) == list(TRACK_FEATURES)
    raw = pq.read_table(tmp_path / "tracks" / "tracks.parquet")
    normal = np.load(tmp_path / "tracks" / "features.npy")
    assert normal.dtype == np.float32
    for name, transform in (("tempo", np.asarray), ("duration", np.log)):
        values = transform(raw[name].to_numpy().astype(np.float64))
        assert statistics[name]["mean"] == pytest.approx(values.mean())
        assert statistics[name]["std"] == pytest.approx(values.std())
        expected = (values - values.mean()) / values.std()
        np.testing.assert_allclose(normal[:, TRACK_FEATURES.index(name)], expected, atol=1e-5)
    assert (np.diff(np.load(tmp_path / "tracks" / "hash.npy").astype(object)) > 0).all()
    assert np.array_equal(np.load(tmp_path / "tracks" / "hash.npy"), hash_ids(raw["track_id"]))


def test_constant_and_extreme_features_are_normalised() -> None:
    features = np.ones((1000, 29))
    features[0] = [100_000, 2100, 100, *[1.0] * 26]
    features[1:, 0] = np.linspace(100, 101, 999)
    columns = dict(zip(TRACK_FEATURES, features.T, strict=True))
    normal, _ = mssd_tracks.normalise(columns)
    assert np.isfinite(normal).all()
    assert normal[0, 0] == mssd_tracks.CLIP
    assert not normal[:, 5].any()


# --- damage: each kind has its own message, and strict stops at it


def edit(path: Path, change: Callable[[list[list[str]]], object]) -> None:
    """Apply ``change`` to the fields of all lines, header first."""
    table = [line.split(",") for line in path.read_text().splitlines()]
    change(table)
    path.write_text("".join(",".join(fields) + "\n" for fields in table))


def put(line: int, column: str, value: str) -> Callable[[list[list[str]]], object]:
    def change(table: list[list[str]]) -> None:
        table[line - 1][table[0].index(column)] = value

    return change


def end_of_first_session(path: Path) -> int:
    """Line number of the last row of the first session."""
    return 1 + int(read_csv(path)[0]["session_length"])


def assert_reported(folder: Path, out: Path, kind: str, message: str, dropped: int = 1) -> None:
    """``kind`` is counted with ``message``, its session left out; strict stops with it."""
    found = prepare([folder], out)
    assert found.counts.keys() == {kind}
    assert len(found.examples[kind]) == min(found.counts[kind], mssd_csv.EXAMPLES)
    assert found.dropped == dropped
    assert sum(found.sessions.values()) == 60 - dropped
    with pytest.raises(DataError) as caught:
        prepare([folder], out, strict=True)
    assert str(caught.value) == found.examples[kind][0]
    assert caught.match(message)
    assert not (out / "manifest.json").exists()
    assert not list(out.rglob(".unfinished*"))


@pytest.mark.parametrize(
    ("column", "value", "kind", "message"),
    [
        ("skip_1", "yes", "bad flag", r"expected true or false in column skip_1, got 'yes'"),
        ("premium", "1", "bad flag", r"expected true or false in column premium, got '1'"),
        ("premium", "TRUE", "bad flag", r"expected true or false in column premium, got 'TRUE'"),
        ("date", "2018-02-30", "bad date", r"expected a date as yyyy-mm-dd .* got '2018-02-30'"),
        ("date", "15/07/18", "bad date", r"expected a date .* or dd-mm-yy .*, got '15/07/18'"),
        ("hour_of_day", "noon", "bad integer", r"whole number from 0 to 23 .*, got 'noon'"),
        ("hour_of_day", "24", "bad integer", r"whole number from 0 to 23 .*hour_of_day, got"),
        ("context_switch", "2", "bad integer", r"from 0 to 1 in column context_switch, got 2"),
        ("context_switch", "", "bad integer", r"from 0 to 1 in column context_switch, got ''"),
        ("context_type", "party", "bad name", r"one of editorial_playlist, .*, got 'party'"),
        ("session_id", "", "bad id", r"an id of 1 to 64 characters in column session_id, got ''"),
        ("session_id", "x" * 65, "bad id", r"an id of 1 to 64 characters .* got 'xxxxx"),
        ("track_id_clean", "t_none", "unknown track", r"a track of the tf_.*, got 't_none'. Add"),
    ],
)
def test_bad_value(
    folder: Path, tmp_path: Path, column: str, value: str, kind: str, message: str
) -> None:
    log = folder / "log_0.csv"
    # The last row of a session, so that even a bad id leaves a session that is cut.
    line = end_of_first_session(log)
    edit(log, put(line, column, value))
    if column == "session_id":
        found = prepare([folder], tmp_path / "out")
        assert found.counts[kind] == 1
        assert sum(found.sessions.values()) == 59
        with pytest.raises(DataError, match=message):
            prepare([folder], tmp_path / "out", strict=True)
    else:
        assert_reported(folder, tmp_path / "out", kind, rf"log_0\.csv, line {line}: .*{message}")


def test_one_bad_value_changes_no_other_row(folder: Path, tmp_path: Path) -> None:
    prepare([folder], tmp_path / "whole")
    first = read_csv(folder / "log_0.csv")[0]["session_id"]
    edit(folder / "log_0.csv", put(3, "skip_1", "maybe"))
    prepare([folder], tmp_path / "damaged")
    left = [row for row in rows_of(tmp_path / "whole") if row["session_id"] != first]
    assert rows_of(tmp_path / "damaged") == left


def test_missing_column(folder: Path, tmp_path: Path) -> None:
    for name, column in (("log_0.csv", "skip_2"), ("tf_0.csv", "valence")):
        whole = (folder / name).read_text()
        edit(folder / name, put(1, column, "other"))
        for strict in (False, True):
            with pytest.raises(DataError, match=rf"{name}, line 1: .* none named {column} in"):
                prepare([folder], tmp_path / "out", strict=strict)
        (folder / name).write_text(whole)


def test_column_twice(folder: Path, tmp_path: Path) -> None:
    edit(folder / "log_0.csv", lambda t: [row.append(row[0]) for row in t])
    with pytest.raises(DataError, match=r"each column once, got \['session_id'\] more than once"):
        prepare([folder], tmp_path / "out")


def test_wrong_number_of_fields(folder: Path, tmp_path: Path) -> None:
    edit(folder / "log_0.csv", lambda t: t[4].append("more"))
    found = prepare([folder], tmp_path / "out")
    assert found.counts == {"fields": 1, "positions": 1}
    assert found.dropped == 1
    with pytest.raises(DataError, match=r"log_0\.csv, line 5: expected 21 fields, got 22 in"):
        prepare([folder], tmp_path / "out", strict=True)


def test_short_and_long_session(folder: Path, tmp_path: Path) -> None:
    def shorten(table: list[list[str]]) -> None:
        del table[6 : int(table[1][2]) + 1]
        for row in table[1:6]:
            row[2] = "5"

    edit(folder / "log_0.csv", shorten)
    message = r"log_0\.csv, line 2: expected 10 to 20 tracks in session 0_.*, got 5"
    assert_reported(folder, tmp_path / "out", "session size", message)


def test_positions(folder: Path, tmp_path: Path) -> None:
    def swap(table: list[list[str]]) -> None:
        table[3], table[4] = table[4], table[3]

    edit(folder / "log_0.csv", swap)
    message = r"line 2: expected positions 1 to \d+, each once .*, got \[1, 2, 4, 3, 5"
    assert_reported(folder, tmp_path / "out", "positions", message)


def test_declared_length_is_not_the_number_of_rows(folder: Path, tmp_path: Path) -> None:
    edit(folder / "log_0.csv", lambda t: t.pop(int(t[1][2])))
    message = r"line 2: expected \d+ rows \(session_length\) of session 0_\S+, got \d+\. The"
    assert_reported(folder, tmp_path / "out", "length", message)


def test_declared_lengths_disagree(folder: Path, tmp_path: Path) -> None:
    edit(folder / "log_0.csv", put(3, "session_length", "19"))
    edit(folder / "log_0.csv", put(2, "session_length", "20"))
    message = r"line 2: expected one session_length for session 0_\S+, got \["
    assert_reported(folder, tmp_path / "out", "lengths disagree", message)


def test_duplicate_session(folder: Path, tmp_path: Path) -> None:
    def repeat(table: list[list[str]]) -> None:
        table += table[1 : int(table[1][2]) + 1]

    lines = len((folder / "log_0.csv").read_text().splitlines())
    edit(folder / "log_0.csv", repeat)
    found = prepare([folder], tmp_path / "out")
    assert (found.counts, found.dropped) == ({"duplicate session": 1}, 1)
    assert sum(found.sessions.values()) == 60
    message = rf"line {lines + 1}: expected each session once, .*, got the one of line 2 again"
    with pytest.raises(DataError, match=message):
        prepare([folder], tmp_path / "out", strict=True)


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


def test_file_cut_in_a_line(folder: Path, tmp_path: Path) -> None:
    log = folder / "log_0.csv"
    data = log.read_bytes()
    lines = data.count(b"\n")
    for cut in (1, 9, 60):
        log.write_bytes(data[:-cut])
        found = prepare([folder], tmp_path / "out")
        assert found.counts == {"truncated": 1, "cut session": 1}
        assert sum(found.sessions.values()) == 59
        message = rf"line {lines}: expected a newline at the end .* The file is cut short"
        with pytest.raises(DataError, match=message):
            prepare([folder], tmp_path / "out", strict=True)


def test_file_cut_in_a_session(folder: Path, tmp_path: Path) -> None:
    edit(folder / "log_0.csv", lambda t: t.pop())
    message = r"expected \d+ rows \(session_length\) of session .* at the end of the file, which is"
    assert_reported(folder, tmp_path / "out", "cut session", message)


def test_damaged_gzip_and_empty_files(folder: Path, tmp_path: Path) -> None:
    packed = gzip.compress((folder / "log_0.csv").read_bytes())
    (folder / "log_0.csv").unlink()
    (folder / "log_0.csv.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"log_0\.csv\.gz: expected a readable csv file, whole"):
        prepare([folder], tmp_path / "out")
    (folder / "log_0.csv.gz").unlink()
    for data, got in ((b"", "an empty file"), (b"session_id,", "b'session_id,' without a newline")):
        (folder / "log_0.csv").write_bytes(data)
        with pytest.raises(
            DataError, match=f"log_0.csv, line 1: expected a header line, got {got}"
        ):
            prepare([folder], tmp_path / "out")
    (folder / "log_0.csv").write_text(",".join(HEADER) + "\n")
    with pytest.raises(DataError, match=r"expected sessions, got none that is whole"):
        prepare([folder], tmp_path / "out")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("tempo", "fast", r"a number from 0 to 1000 in column tempo, got 'fast'"),
        ("tempo", "nan", r"a number from 0 to 1000 in column tempo, got"),
        ("acousticness", "1.5", r"a number from 0 to 1 in column acousticness, got 1\.5"),
        ("mode", "dorian", r"one of minor, major in column mode, got 'dorian'"),
        ("release_year", "1e3", r"a whole number from 1850 to 2100 .*, got '1e3'"),
    ],
)
def test_bad_track(folder: Path, tmp_path: Path, column: str, value: str, message: str) -> None:
    edit(folder / "tf_0.csv", put(2, column, value))
    found = prepare([folder], tmp_path / "out")
    assert found.tracks == 1_999
    with pytest.raises(DataError, match=rf"tf_0\.csv, line 2: expected {message}"):
        prepare([folder], tmp_path / "out", strict=True)


def test_a_row_is_counted_once(folder: Path, tmp_path: Path) -> None:
    with (folder / "log_0.csv").open("a") as file:
        file.write("\n")  # an empty line: every column of it is bad
    found = prepare([folder], tmp_path / "out")
    assert (found.counts, sum(found.sessions.values())) == ({"bad id": 1}, 60)


def test_long_values_are_shown_in_part(folder: Path, tmp_path: Path) -> None:
    edit(folder / "log_0.csv", put(2, "context_type", "x" * 10_000))
    with pytest.raises(DataError) as caught:
        prepare([folder], tmp_path / "out", strict=True)
    assert len(str(caught.value)) < 500


def test_duplicate_track(folder: Path, tmp_path: Path) -> None:
    edit(folder / "tf_0.csv", lambda t: t.append([t[1][0], *t[2][1:]]))
    found = prepare([folder], tmp_path / "out")
    assert (found.tracks, found.counts) == (2_000, {"duplicate track": 1})
    with pytest.raises(DataError, match=r"tf_0\.csv, line 2002: expected each track once, got t_"):
        prepare([folder], tmp_path / "out", strict=True)


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


# --- resuming


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
            for module in ("mssd", "mssd_shards", "mssd_tracks"):
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
    two = prepare([source], tmp_path / "two", workers=2, progress=True)
    assert one == two
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert manifest(tmp_path / "one") == manifest(tmp_path / "two")


@pytest.fixture
def quick_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes forked from one that has imported torch already, instead of spawned ones."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["maskmoe_kernels.experiments.skip.data.mssd"])
    monkeypatch.setattr(multiprocessing, "get_context", lambda method=None: context)


@pytest.mark.usefixtures("quick_processes")
def test_error_in_a_process_arrives(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "in")
    edit(tmp_path / "in" / "log_1.csv", put(2, "date", "never"))
    with pytest.raises(DataError, match=r"log_1\.csv, line 2: expected a date .* got 'never'"):
        prepare([tmp_path / "in"], tmp_path / "out", workers=2, strict=True)


def test_other_arguments(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at least 1, got 0, 2048"):
        prepare([source], tmp_path, workers=0)


# --- details


@given(st.lists(st.text(max_size=40), max_size=30), st.integers(0, 3))
def test_hash_tells_ids_apart_and_knows_no_offset(ids: list[str], skip: int) -> None:
    digests = hash_ids(ids)
    assert len(set(digests.tolist())) == len({*ids})
    assert np.array_equal(hash_ids(pa.array(ids, pa.string())[skip:]), digests[skip:])


def test_hash_is_the_same_for_ever() -> None:
    # Splits depend on it.
    assert hash_ids(["0_00006f66", ""]).tolist() == [
        7477730767629313226,
        16294208416658607535,
    ]


def test_dates() -> None:
    assert parse_date("2018-07-15") == parse_date("15-07-18") == 17727
    for bad in ("2018-7-15", "15-13-18", "", "0000-01-01", "2018-07-15 ", "١٥-07-18"):
        assert parse_date(bad) is None


# --- the real sessions


def test_real_sessions(shared_data: Path, tmp_path: Path) -> None:
    found = prepare([shared_data / "mssd-sample"], tmp_path, strict=True)
    assert (found.tracks, sum(found.sessions.values()), found.counts) == (175, 11, {})
    rows = rows_of(tmp_path)
    assert len(rows) == 201
    assert sum(row["skip_2"] for row in rows) == 82
    assert sum(row["premium"] for row in rows) == 181
    assert sorted({str(row["date"]) for row in rows}) == ["2018-07-14", "2018-07-15"]
