"""Damaged csv files: each problem has its message, and ``strict`` stops at it."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.skip.data import csv_file
from maskmoe_kernels.experiments.skip.data.prepare import prepare
from tests.experiments.skip.data.files import (
    HEADER,
    assert_reported,
    contents,
    edit,
    end_of_first_session,
    put,
)


def test_blocks_do_not_show(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare([source], tmp_path / "one", row_group=7)
    blocks = csv_file.CsvFile.blocks
    monkeypatch.setattr(csv_file.CsvFile, "blocks", lambda self: blocks(self, 9_999))
    prepare([source], tmp_path / "many", row_group=7)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


@pytest.mark.parametrize(
    ("column", "value", "kind", "message"),
    [
        ("skip_1", "yes", "bad flag", r"expected true or false in column skip_1, got 'yes'"),
        ("premium", "2", "bad flag", r"expected true or false in column premium, got '2'"),
        (
            "premium",
            "T",
            "bad flag",
            r"expected true or false in column premium, got 'T'\. Write",
        ),
        ("date", "2018-02-30", "bad date", r"expected a date as yyyy-mm-dd .* got '2018-02-30'"),
        ("date", "15/07/18", "bad date", r"expected a date .* or dd-mm-yy .*, got '15/07/18'"),
        ("hour_of_day", "noon", "bad integer", r"whole number from 0 to 23 .*, got 'noon'"),
        (
            "hour_of_day",
            "14.5",
            "bad integer",
            r"number from 0 to 23 .*, got '14\.5'\. Write",
        ),
        ("hour_of_day", "true", "bad integer", r"whole number from 0 to 23 .*, got 'true'"),
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
