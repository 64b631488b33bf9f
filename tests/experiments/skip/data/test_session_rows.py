"""Damaged sessions: each problem has its message, and ``strict`` stops at it."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.skip.data.prepare import prepare
from tests.experiments.skip.data.files import (
    assert_reported,
    edit,
    put,
)


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


def test_file_cut_in_a_session(folder: Path, tmp_path: Path) -> None:
    edit(folder / "log_0.csv", lambda t: t.pop())
    message = r"expected \d+ rows \(session_length\) of session .* at the end of the file, which is"
    assert_reported(folder, tmp_path / "out", "cut session", message)
