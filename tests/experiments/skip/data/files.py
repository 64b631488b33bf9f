"""Reads what ``prepare`` wrote, and damages csv files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.skip.data import csv_file
from maskmoe_kernels.experiments.skip.data.columns import LOG_COLUMNS
from maskmoe_kernels.experiments.skip.data.prepare import prepare
from maskmoe_kernels.experiments.skip.data.shard_format import SPLITS

SESSIONS = 120
HEADER = [column.name for column in LOG_COLUMNS]


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
    assert len(found.examples[kind]) == min(found.counts[kind], csv_file.EXAMPLES)
    assert found.dropped == dropped
    assert sum(found.sessions.values()) == 60 - dropped
    with pytest.raises(DataError) as caught:
        prepare([folder], out, strict=True)
    assert str(caught.value) == found.examples[kind][0]
    assert caught.match(message)
    assert not (out / "manifest.json").exists()
    assert not list(out.rglob(".unfinished*"))
