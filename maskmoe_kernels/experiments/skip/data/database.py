"""Sorts of tables that are larger than memory, by DuckDB."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.files import replacing

#: What a sort may hold in memory; beyond, it writes to files in the folder of the shards.
MEMORY = "512MB"
#: Rows of a row group of a sorted table.
ROWS = 1 << 16


def check_duckdb() -> Any:
    """The module ``duckdb``.

    Raises:
        DataError: It is not installed.
    """
    try:
        return importlib.import_module("duckdb")
    except ImportError as error:
        raise DataError(
            "events are sorted and joined by duckdb, which is not installed. Run: "
            'pip install "maskmoe_kernels[sessions]"'
        ) from error


@contextmanager
def database(folder: Path, threads: int) -> Iterator[Any]:
    """A connection whose memory is bounded and whose files of a moment are in ``folder``.

    Args:
        folder: The folder.
        threads: Its threads.
    """
    spilled = folder / ".duckdb"
    shutil.rmtree(spilled, ignore_errors=True)  # of a run that was killed
    connection = check_duckdb().connect()
    try:
        connection.execute(f"SET memory_limit = '{MEMORY}'")
        connection.execute(f"SET threads = {threads}")
        connection.execute(f"SET temp_directory = {quoted(spilled)}")
        yield connection
    finally:
        connection.close()
        shutil.rmtree(spilled, ignore_errors=True)


def write_sorted(
    connection: Any, sources: Sequence[Path], target: Path, select: str, order: str
) -> None:
    """Write rows of parquet files, sorted, to one parquet file that takes its name when whole.

    Args:
        connection: From :func:`database`.
        sources: The files.
        target: The new file.
        select: What is selected, and how it is grouped: ``{}`` stands for the files.
        order: The columns by which it is sorted.
    """
    files = "read_parquet([" + ", ".join(map(quoted, sources)) + "])"
    with replacing(target) as file:
        options = f"FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {ROWS}, USE_TMP_FILE false"
        query = f"{select.format(files)} ORDER BY {order}"
        try:
            connection.execute(f"COPY ({query}) TO {quoted(Path(file.name))} ({options})")
        except check_duckdb().Error as error:
            raise DataError(
                f"{target}: expected duckdb to sort into this file, got {error}. It needs as much "
                "room on the disk as the events, twice, and the memory that it asks for; then run "
                "the same command with --resume."
            ) from error


def quoted(path: Path) -> str:
    """A path as a text of SQL."""
    return "'" + str(path).replace("'", "''") + "'"
