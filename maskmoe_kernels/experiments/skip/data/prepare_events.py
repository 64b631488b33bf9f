"""Prepares logs whose events are to be sorted by user and time, in steps that are kept.

::

    checked/    valid rows of each file, see :mod:`.event_file`; several processes
    sorted/     all events by user and time; by item and time, for features of items; relations
    part-*      sessions of some users, see :mod:`.chunk`; several processes

A step whose inputs did not change is not done again. After the last one, ``checked`` and
``sorted`` may be deleted; a later run makes them anew.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.progress import OpenBar
from maskmoe_kernels.experiments.shared.report import sealed, write_json
from maskmoe_kernels.experiments.skip.data.arrays import Array
from maskmoe_kernels.experiments.skip.data.chunk import (
    EVENTS,
    ITEM_BOUNDS,
    ITEM_LABELS,
    ITEM_TIMES,
    SORTED_FOLDER,
    Chunk,
    convert_chunk,
)
from maskmoe_kernels.experiments.skip.data.database import check_duckdb, database, write_sorted
from maskmoe_kernels.experiments.skip.data.event_file import (
    CHECKED_FOLDER,
    EventFile,
    check_file,
)
from maskmoe_kernels.experiments.skip.data.processes import run_all
from maskmoe_kernels.experiments.skip.data.records import (
    FORMAT,
    LOGS_FOLDER,
    TRACKS_FOLDER,
    USERS_FOLDER,
    is_intact,
    read_record,
    save_array,
    size_and_checksum,
)
from maskmoe_kernels.experiments.skip.data.sources import bytes_of
from maskmoe_kernels.experiments.skip.data.tracks import (
    DIGESTS,
    KNOWN,
    prepare_table,
    write_table,
)
from maskmoe_kernels.experiments.skip.schema.column import Column
from maskmoe_kernels.experiments.skip.schema.schema import Schema, Table
from maskmoe_kernels.files import claim, replacing

#: Events of a chunk, about: those of one user stay together. Each process holds one.
CHUNK_EVENTS = 250_000
_RECORD = "sorted.json"


@dataclass(frozen=True)
class _Job:
    """What all steps know; see :func:`prepare_events`."""

    out: Path
    schema: Schema
    strict: bool
    workers: int
    row_group: int
    open_bar: OpenBar


def prepare_events(
    files: Mapping[str, Sequence[Path]],
    out: Path,
    schema: Schema,
    strict: bool,
    workers: int,
    row_group: int,
    open_bar: OpenBar,
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Check, sort, and divide into sessions.

    Memory: the tables of items and users; a sort 512 MB; each process some 100,000s of events.

    Args:
        files: Table -> its files; see :func:`find_tables`.
        out: Folder of the shards.
        schema: The schema.
        strict: Stop at the first problem instead of leaving out the row.
        workers: Processes.
        row_group: Sessions of a row group.
        open_bar: Opens a progress bar.
    Returns:
        Folder of a table -> its record, and name of a part -> its record.
    Raises:
        DataError: See :func:`prepare`; or duckdb is not installed.
    """
    check_duckdb()
    job = _Job(out, schema, strict, workers, row_group, open_bar)
    for folder in (USERS_FOLDER, CHECKED_FOLDER, SORTED_FOLDER):
        claim(out / folder)
    tables = {}
    for name, folder, table in (
        ("items", TRACKS_FOLDER, schema.items), ("users", USERS_FOLDER, schema.users),
    ):  # fmt: skip
        if table is not None:
            advance = open_bar(name, bytes_of(files[name]))
            tables[folder] = prepare_table(
                table, files[name], out, folder, strict=strict, advance=advance
            )
    checked = _check_files(job, files, tables)
    inputs = _digest(checked, tables, schema)
    bounds, tables = _sort(job, checked, tables, inputs)
    sources = tuple(files["events"])
    chunks = [
        Chunk(i, begin, end, out, schema, inputs, sources, row_group, strict)
        for i, (begin, end) in enumerate(itertools.pairwise(bounds))
    ]
    bars = [(chunk.name, chunk.end - chunk.begin) for chunk in chunks]
    records = run_all(chunks, convert_chunk, bars, workers, open_bar)
    named = {chunk.name: record for chunk, record in zip(chunks, records, strict=True)}
    _remove_others(out, set(named))
    _add_problems(tables, checked, named)
    tables[USERS_FOLDER]["files"][KNOWN] = _write_known(job, named)
    return tables, named


def _check_files(
    job: _Job, files: Mapping[str, Sequence[Path]], tables: Mapping[str, dict[str, Any]]
) -> dict[str, list[tuple[EventFile, dict[str, Any]]]]:
    """The files of events and relations with their records, by table."""
    digests = {folder: table["digest"] for folder, table in tables.items()}
    todo = [
        EventFile(path, i, job.out, name, job.schema, digests, job.strict)
        for name in ("events", *job.schema.relations)
        for i, path in enumerate(files[name])
    ]
    bars = [(file.source.name, bytes_of([file.source])) for file in todo]
    records = run_all(todo, check_file, bars, job.workers, job.open_bar)
    checked: dict[str, list[tuple[EventFile, dict[str, Any]]]] = {}
    for file, record in zip(todo, records, strict=True):
        checked.setdefault(file.table, []).append((file, record))
    if not any(record["rows"] for _, record in checked["events"]):
        first = [e[0] for _, r in checked["events"] for e in r["problems"]["examples"].values()]
        raise DataError(
            f"{', '.join(map(str, files['events']))}: expected events, got none that is valid. "
            f"{' '.join(first[:1])}".rstrip()
        )
    return checked


def _digest(
    checked: Mapping[str, list[tuple[EventFile, dict[str, Any]]]],
    tables: Mapping[str, dict[str, Any]],
    schema: Schema,
) -> str:
    """A digest of all that sorted tables and sessions are made from."""
    content = {
        "checked": {n: [r["digest"] for _, r in found] for n, found in checked.items()},
        "tables": {name: table["digest"] for name, table in tables.items()},
        "schema": schema.data,
        "chunk": CHUNK_EVENTS,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sort_relations(job: _Job, connection: Any, paths: Mapping[str, list[Path]]) -> None:
    for name in job.schema.relations:
        target = job.out / SORTED_FOLDER / f"{name}.parquet"
        target.unlink(missing_ok=True)
        if paths[name]:
            write_sorted(
                connection, paths[name], target, 'SELECT "user", item, since FROM {}',
                '"user", item, since',
            )  # fmt: skip


def _sort(
    job: _Job,
    checked: Mapping[str, list[tuple[EventFile, dict[str, Any]]]],
    tables: dict[str, dict[str, Any]],
    inputs: str,
) -> tuple[list[int], dict[str, dict[str, Any]]]:
    """Sort, unless an earlier run did.

    Returns:
        Rows of the sorted events at which chunks begin, and the end; and the tables.
    """
    folder = job.out / SORTED_FOLDER
    record = read_record(folder / _RECORD)
    if (
        record
        and record["inputs"] == inputs
        and all(is_intact(job.out / n, e) for n, e in record["files"].items())
    ):
        return record["bounds"], record["tables"]
    (folder / _RECORD).unlink(missing_ok=True)
    made = dict(tables)
    paths = {
        name: [file.target for file, record in found if record["rows"]]
        for name, found in checked.items()
    }
    size = sum(path.stat().st_size for path in paths["events"])
    bar = job.open_bar("sort", size)
    with database(job.out, job.workers) as connection:
        for key, table_folder, column in (
            ("item", TRACKS_FOLDER, job.schema.events.item),
            ("user", USERS_FOLDER, job.schema.events.user),
        ):
            if table_folder not in made:
                made[table_folder] = _collect(job, connection, paths, key, table_folder, column)
        time = f'"event_{job.schema.events.time}"'
        write_sorted(
            connection, paths["events"], folder / EVENTS,
            "SELECT * EXCLUDE (" + ", ".join(_ids(tables)) + ") FROM {}" if _ids(tables)
            else "SELECT * FROM {}", f'"user", {time}, source, line',
        )  # fmt: skip
        _sort_relations(job, connection, paths)
        if any(past.of == "item" for past in job.schema.past.values()):
            _sort_by_item(job, connection, paths["events"], time)
    bar(size)
    bounds = _chunk_bounds(folder / EVENTS)
    files = [p for p in sorted(folder.iterdir()) if p.suffix in (".parquet", ".npy")]
    record = {
        "format": FORMAT,
        "inputs": inputs,
        "bounds": bounds,
        "tables": made,
        "files": {str(p.relative_to(job.out)): size_and_checksum(p) for p in files},
    }
    write_json(folder / _RECORD, sealed(record))
    return bounds, made


def _ids(tables: Mapping[str, Any]) -> list[str]:
    """Columns of the checked events that only the tables that are not given need."""
    missing = (("item_id", TRACKS_FOLDER), ("user_id", USERS_FOLDER))
    return [name for name, folder in missing if folder not in tables]


def _collect(
    job: _Job,
    connection: Any,
    paths: Mapping[str, Sequence[Path]],
    key: str,
    folder: str,
    column: str,
) -> dict[str, Any]:
    """Make the table of items or users from the events' own ids; return its record."""
    target = job.out / SORTED_FOLDER / f"{folder}.parquet"
    select = f'SELECT "{key}" AS digest, min({key}_id) AS id FROM {{}} GROUP BY digest'
    write_sorted(connection, paths["events"], target, select, "digest")
    found = pq.read_table(target)
    digests = found["digest"].to_numpy()
    ids = found["id"].combine_chunks()
    content = write_table(
        Table("", (Column(column, "id"),), column), job.out / folder, ids, digests, {}
    )
    digest = hashlib.sha256(np.ascontiguousarray(digests).tobytes()).hexdigest()
    return content | {"digest": digest, "problems": {}}


def _sort_by_item(job: _Job, connection: Any, events: Sequence[Path], time: str) -> None:
    """Write times and labels of all events by item and time, which chunks map into memory."""
    folder = job.out / SORTED_FOLDER
    target = folder / "items.parquet"
    label = f'"event_{job.schema.events.label}"'
    select = f"SELECT item, {time} AS time, {label} AS label FROM {{}}"
    write_sorted(connection, events, target, select, "item, time, label")
    digests = np.load(job.out / TRACKS_FOLDER / DIGESTS, mmap_mode="r")
    count = np.zeros(len(digests), np.int64)
    with pq.ParquetFile(target) as file:
        total = file.metadata.num_rows
        times = _new_array(folder / ITEM_TIMES, total)
        labels = _new_array(folder / ITEM_LABELS, total + 1)
        start = labels_so_far = 0
        labels[0] = 0
        for batch in file.iter_batches(1 << 16, use_threads=False):
            end = start + len(batch)
            np.add.at(count, np.searchsorted(digests, batch["item"].to_numpy()), 1)
            times[start:end] = batch["time"].to_numpy()
            own = np.cumsum(batch["label"].to_numpy(zero_copy_only=False), dtype=np.int64)
            labels[start + 1 : end + 1] = labels_so_far + own
            labels_so_far += int(own[-1])
            start = end
    save_array(folder / ITEM_BOUNDS, np.append(0, np.cumsum(count)))
    for array in (times, labels):
        array.flush()


def _new_array(path: Path, size: int) -> Any:
    """A new ``.npy`` file of int64 that is mapped into memory; its record vouches for it."""
    return np.lib.format.open_memmap(path, "w+", np.int64, (size,))


def _chunk_bounds(path: Path) -> list[int]:
    """Rows at which chunks of whole users begin, and the number of rows."""
    bounds, row, last = [0], 0, None
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(1 << 16, columns=["user"], use_threads=False):
            user: Array = batch["user"].to_numpy()
            new = np.append(last is not None and user[0] != last, user[1:] != user[:-1])
            for begin in (row + new.nonzero()[0]).tolist():
                if begin - bounds[-1] >= CHUNK_EVENTS:
                    bounds.append(begin)
            row, last = row + len(user), user[-1]
    return [*bounds, row]


def _remove_others(out: Path, names: set[str]) -> None:
    """Remove shards and records of earlier runs with other chunks."""
    for path in (*out.glob("*/part-*.parquet"), *(out / LOGS_FOLDER).glob("part-*.json")):
        if path.stem not in names:
            path.unlink()


def _add_problems(
    tables: Mapping[str, dict[str, Any]],
    checked: Mapping[str, list[tuple[EventFile, dict[str, Any]]]],
    parts: Mapping[str, dict[str, Any]],
) -> None:
    """Add the problems of the files to those of the tables, for the summary."""
    problems = tables[TRACKS_FOLDER]["problems"] = dict(tables[TRACKS_FOLDER]["problems"])
    for found in checked.values():
        problems |= {str(file.source): r["problems"] for file, r in found}
    for key, text in (("short", "shorter than `shortest`"), ("long", "longer than `longest`")):
        if count := sum(record[key] for record in parts.values()):
            problems[key] = {"counts": {f"sessions {text}": count}, "examples": {}}


def _write_known(job: _Job, parts: Mapping[str, dict[str, Any]]) -> dict[str, int]:
    """Write which users have sessions in training; return size and checksum of the file."""
    digests = np.load(job.out / USERS_FOLDER / DIGESTS, mmap_mode="r")
    known = np.zeros(len(digests), bool)
    for name, record in parts.items():
        if record["bytes"]["train"]:
            path = job.out / "train" / f"{name}.parquet"
            known[pq.read_table(path, columns=["user"], use_threads=False)["user"].to_numpy()] = 1
    path = job.out / USERS_FOLDER / KNOWN
    with replacing(path) as file:
        np.save(file, known)
    return size_and_checksum(path)
