"""Writes generated sessions, with the causes of their labels.

Sessions of the kind ``mssd`` are in the official csv format. Lengths, contexts, accounts, reasons,
skips, and the tracks' features follow the statistics in :mod:`.calibration`. The rules that decide
half B are those of :mod:`.causes`. Sessions of the kind ``users``: see :mod:`.users`.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pyarrow import csv
from rich.console import Console

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.progress import counted
from maskmoe_kernels.experiments.shared.report import read_json, write_json
from maskmoe_kernels.experiments.skip.data.columns import LOG_COLUMNS, TRACK_COLUMNS
from maskmoe_kernels.experiments.skip.generator import causes
from maskmoe_kernels.experiments.skip.generator.chunk import catalogue_of, draw_chunk
from maskmoe_kernels.experiments.skip.generator.settings import GeneratorSettings
from maskmoe_kernels.experiments.skip.generator.users import SESSIONS, USERS, Tracks, Users
from maskmoe_kernels.files import claim, replacing

#: File of the settings, which is written first.
SETTINGS = "generation.json"
#: How the names of generated files begin.
_TABLES = ("log", "tf", "causes", "events", "tracks", "users", "favourites", "banned")
_ITEMS = () if USERS.items is None else USERS.items.columns
_REMEDY = "Give --overwrite to replace them, or name an empty folder."


def generate(
    out: str | Path,
    settings: GeneratorSettings,
    *,
    workers: int = 1,
    console: Console | None = None,
) -> None:
    """Write ``tf_0.csv``, ``log_*.csv`` and ``causes_*.parquet`` to ``out``.

    Of the kind ``users``: ``tracks_0.csv``, ``users_*.csv``, and ``events_*``, ``favourites_*``,
    ``banned_*`` and ``causes_*.parquet``.

    Chunks that an earlier run with the same settings wrote are kept. Memory: one chunk a worker.

    Args:
        out: The folder; made if missing.
        settings: What to generate.
        workers: Processes that write chunks in parallel.
        console: Where progress is shown; ``None`` is quiet.
    Raises:
        DataError: ``out`` holds sessions of other or unknown settings.
        ValueError: ``workers`` is below 1.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    out = claim(out)
    check_settings(out, settings)
    table, header, last = "tf_0.csv", [column.name for column in TRACK_COLUMNS], "log_{}.csv"
    if settings.kind == "users":
        table, header, last = "tracks_0.csv", [c.name for c in _ITEMS], "events_{}.parquet"
    if not (out / table).is_file():
        drawn = _tracks_of(settings) if settings.kind == "users" else catalogue_of(settings)
        _write_csv(out / table, header, drawn.table())
    todo = [k for k in range(settings.chunks) if not (out / last.format(k)).is_file()]
    done = _write_chunks(out, settings, todo, workers)
    for _ in counted(console, "generate", done, len(todo), "log files"):
        pass


def remove(out: Path) -> None:
    """Remove the sessions that :func:`generate` wrote; a folder of other sessions stays."""
    if not (out / SETTINGS).is_file():
        return
    for pattern in (*(f"{name}_*" for name in _TABLES), SETTINGS):
        for path in out.glob(pattern):
            path.unlink()


def check_settings(out: Path, settings: GeneratorSettings) -> None:
    """Check that a folder is for sessions of these settings; write them down in a new folder.

    Raises:
        DataError: The folder holds sessions of other or unknown settings.
    """
    path, wanted = out / SETTINGS, dict(vars(settings))
    if settings.kind == "mssd":  # the only kind there was at first
        del wanted["kind"]
    if path.is_file():
        found = read_json(path, _REMEDY)
        if found != wanted:
            raise DataError(f"{path}: expected {wanted}, got {found}. {_REMEDY}")
    elif strange := sorted(p.name for k in _TABLES for p in out.glob(f"{k}_*")):
        raise DataError(
            f"{out}: expected no sessions of unknown origin, got {strange[:5]}. Name an empty "
            "folder."
        )
    else:
        write_json(path, wanted)


def _write_chunks(
    out: Path, settings: GeneratorSettings, todo: list[int], workers: int
) -> Iterator[None]:
    """Write the chunks ``todo``; yield after each."""
    if workers == 1 or len(todo) < 2:
        for number in todo:
            _write_chunk(out, settings, number)
            yield
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(todo)), mp_context=context) as pool:
        tasks: list[Future[None]] = [pool.submit(_write_chunk, out, settings, k) for k in todo]
        for task in as_completed(tasks):
            task.result()
            yield


def _write_chunk(out: Path, settings: GeneratorSettings, number: int) -> None:
    if settings.kind == "users":
        _write_users(out, settings, number)
        return
    log, table = draw_chunk(settings, number)
    with replacing(out / f"causes_{number}.parquet") as file:
        pq.write_table(causes.sealed(table), file)
    # The log is written last: a chunk with a log is complete.
    _write_csv(out / f"log_{number}.csv", [column.name for column in LOG_COLUMNS], log)


@lru_cache(maxsize=1)
def _tracks_of(settings: GeneratorSettings) -> Tracks:
    return Tracks.draw(settings.tracks, settings.seed)


def _write_users(out: Path, settings: GeneratorSettings, number: int) -> None:
    each = -(-settings.chunk // SESSIONS)
    count = min(each, -(-settings.sessions // SESSIONS) - number * each)
    users = Users(_tracks_of(settings), number * each, count, SESSIONS, settings.seed)
    tables = dict(users.tables())
    _write_csv(out / f"users_{number}.csv", ["user_id", "age"], tables["users"])
    tables["causes"] = causes.sealed(tables["causes"].cast(causes.SCHEMA), USERS)
    # The events are written last: a chunk with events is complete.
    for name in ("favourites", "banned", "causes", "events"):
        with replacing(out / f"{name}_{number}.parquet") as file:
            pq.write_table(tables[name], file)


def _write_csv(path: Path, header: list[str], table: Any) -> None:
    with replacing(path) as file:
        file.write((",".join(header) + "\n").encode())
        # No value contains a comma, so none is quoted.
        plain = csv.WriteOptions(include_header=False, quoting_style="none")
        csv.write_csv(table.select(header), file, plain)
