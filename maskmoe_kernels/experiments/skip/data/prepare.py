"""The Music Streaming Sessions Dataset: from the official csv files to checked parquet shards.

``prepare`` writes the folder that :mod:`.records` describes and :mod:`.shards` reads.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.progress import OpenBar, shown_bytes
from maskmoe_kernels.experiments.shared.report import sealed, write_json
from maskmoe_kernels.experiments.skip.data.arrays import UInt64s
from maskmoe_kernels.experiments.skip.data.log_file import LogFile, convert
from maskmoe_kernels.experiments.skip.data.packed import ENDINGS
from maskmoe_kernels.experiments.skip.data.records import (
    FORMAT,
    LOGS_FOLDER,
    MANIFEST,
    TRACKS_FOLDER,
)
from maskmoe_kernels.experiments.skip.data.shard_format import ROW_GROUP, SPLITS
from maskmoe_kernels.experiments.skip.data.tracks import prepare_tracks
from maskmoe_kernels.files import claim

#: Sessions whose digests are compared at a time, in 320 MB.
_COMPARED = 20_000_000
_REMEDY = (
    "Name the folder that holds the official log_*.csv and tf_*.csv, unpacked from their "
    "archives (`tar -xf`, `unzip`), or those files."
)


@dataclass(frozen=True)
class Prepared:
    """The result of :func:`prepare`.

    Attributes:
        tracks: Number of tracks.
        sessions: Split -> number of sessions.
        dropped: Number of sessions that were left out because of a problem.
        counts: Kind of problem -> number of rows or sessions, over all files.
        examples: Kind of problem -> the first messages, with file and line.
    """

    tracks: int
    sessions: dict[str, int]
    dropped: int
    counts: dict[str, int]
    examples: dict[str, list[str]]


def find_sources(*paths: str | Path) -> tuple[list[Path], list[Path]]:
    """Find log files and track files.

    Args:
        paths: Files, or folders that are searched with their subfolders.
    Returns:
        The log files and the track files, each sorted by name.
    Raises:
        DataError: A path does not exist, there is no log file or no track file, or two log files
            have the same name.
    """
    logs: set[Path] = set()
    tracks: set[Path] = set()
    for path in map(Path, paths):
        if path.is_dir():
            found = [p for ending in ENDINGS for p in path.rglob(f"*{ending}")]
        elif path.is_file():
            found = [path]
        else:
            raise DataError(f"{path}: expected a file or a folder, got nothing there. {_REMEDY}")
        logs.update(p for p in found if p.name.startswith("log_"))
        tracks.update(p for p in found if p.name.startswith("tf_"))
    for kind, files in (("log_*.csv", logs), ("tf_*.csv", tracks)):
        if not files:
            names = ", ".join(map(str, paths))
            raise DataError(f"{names}: expected a {kind} (or .csv.gz), got none. {_REMEDY}")
    by_name: dict[str, Path] = {}
    for path in sorted(logs):
        name = LogFile(path, Path(), "").name
        if name in by_name:
            raise DataError(
                f"{path} and {by_name[name]}: expected log files of different names, for the "
                f"shards are named after them, got {name} twice. Leave one out or rename it."
            )
        by_name[name] = path
    return sorted(logs, key=lambda p: p.name), sorted(tracks, key=lambda p: p.name)


def prepare(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    strict: bool = False,
    workers: int = 1,
    row_group: int = ROW_GROUP,
    console: Console | None = None,
) -> Prepared:
    """Convert the official csv files in ``sources`` to shards in ``out``.

    A log file that an earlier run converted is not converted again, unless the file, the tracks
    or ``row_group`` changed. Memory: each worker holds a few blocks of csv and a row group; while
    the tracks are read, about 700 bytes a track.

    Args:
        sources: Files, or folders that hold them; see :func:`find_sources`.
        out: Folder of the shards; made if missing.
        strict: Stop at the first problem instead of leaving out the session.
        workers: Processes that convert log files in parallel.
        row_group: Sessions of a row group.
        console: Where to show how far it is; ``None`` is quiet.
    Raises:
        DataError: A file cannot be read or lacks a column, no session is left, or ``strict`` and
            there is a problem; the message names file and line. ``out`` then has no manifest.
        ValueError: ``workers`` or ``row_group`` is below 1.
    """
    if workers < 1 or row_group < 1:
        raise ValueError(f"workers and row_group must be at least 1, got {workers}, {row_group}")
    out = Path(out)
    logs, tracks = find_sources(*sources)
    for folder in (out, *(out / name for name in (TRACKS_FOLDER, LOGS_FOLDER, *SPLITS))):
        claim(folder)
    (out / MANIFEST).unlink(missing_ok=True)
    with shown_bytes(console) as open_bar:
        advance = open_bar("tracks", _bytes(tracks))
        table = prepare_tracks(tracks, out, strict=strict, advance=advance)
        files = [LogFile(path, out, table["digest"], row_group, strict) for path in logs]
        records = _records(files, workers, open_bar)
        _remove_repeats(files, records, workers, open_bar)
    _write_manifest(out, table, files, records)
    return _summary(table, records)


def _records(logs: Sequence[LogFile], workers: int, open_bar: OpenBar) -> list[dict[str, Any]]:
    """The record of each log file; a file without a valid one is converted."""
    records = [log.valid_record() for log in logs]
    digests = {log.name: r["digest"] for log, r in zip(logs, records, strict=True) if r}
    for i, record in enumerate(records):
        # Sessions were dropped because earlier files held them. If such a file changed, they may
        # no longer be there, so this file is converted again.
        if record and any(digests.get(name) != d for name, d in record["because"].items()):
            records[i] = None
    todo = [i for i, record in enumerate(records) if record is None]
    for i, record in zip(
        todo, _convert_all([logs[i] for i in todo], workers, open_bar), strict=True
    ):
        records[i] = record
    return [record for record in records if record is not None]


def _convert_all(logs: Sequence[LogFile], workers: int, open_bar: OpenBar) -> list[dict[str, Any]]:
    """Convert log files, in several processes if there are several files and workers."""
    if len(logs) > 1 and workers > 1:
        return _convert_in_processes(logs, workers, open_bar)
    return [convert(log, open_bar(log.name, _bytes([log.source]))) for log in logs]


def _convert_in_processes(
    logs: Sequence[LogFile], workers: int, open_bar: OpenBar
) -> list[dict[str, Any]]:
    # Spawn, do not fork: the threads of pyarrow and torch do not survive a fork.
    context = multiprocessing.get_context("spawn")
    done = context.Array(ctypes.c_int64, len(logs))  # bytes read of each file, in shared memory
    with ProcessPoolExecutor(
        min(workers, len(logs)), mp_context=context, initializer=_set_done, initargs=(done,)
    ) as pool:
        tasks: list[Future[dict[str, Any]]] = [
            pool.submit(_convert_counted, log, i) for i, log in enumerate(logs)
        ]
        advance = [open_bar(log.name, _bytes([log.source])) for log in logs]
        shown = [0] * len(logs)
        try:
            waiting: set[Future[dict[str, Any]]] = set(tasks)
            while waiting:
                finished, waiting = wait(waiting, timeout=0.2)
                for i, count in enumerate(done[:]):
                    advance[i](count - shown[i])
                    shown[i] = count
                for task in finished:
                    task.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [task.result() for task in tasks]


_done: Any = None  # in a worker process: the array of bytes read


def _set_done(done: Any) -> None:
    global _done
    _done = done


def _convert_counted(log: LogFile, number: int) -> dict[str, Any]:
    def advance(count: int) -> None:
        _done[number] += count

    return convert(log, advance)


def _remove_repeats(
    logs: Sequence[LogFile], records: list[dict[str, Any]], workers: int, open_bar: OpenBar
) -> None:
    """Convert the files that repeat sessions of earlier files again, without those sessions.

    Args:
        logs: All log files.
        records: Their records, which are replaced.
        workers: Processes.
        open_bar: Opens a progress bar.
    """
    total = sum(record["sessions"] for record in records)
    repeats = _repeats(logs, parts=-(-total // _COMPARED))
    todo = []
    for i, by_file in repeats.items():
        earlier = {logs[k].name: records[k]["digest"] for k in sorted(by_file)}
        excluded = np.unique(np.concatenate([*by_file.values()]))
        todo.append(replace(logs[i], excluded=excluded, earlier=earlier))
        logs[i].record.unlink(missing_ok=True)
    for i, record in zip(repeats, _convert_all(todo, workers, open_bar), strict=True):
        records[i] = record


def _repeats(logs: Sequence[LogFile], parts: int) -> dict[int, dict[int, UInt64s]]:
    """Which sessions occur in several log files.

    Args:
        logs: All log files.
        parts: In how many parts the digests are compared, to bound the memory.
    Returns:
        Log file -> earlier log file -> digests of the sessions that are in both.
    """
    found: dict[int, dict[int, UInt64s]] = {}
    for part in range(parts):
        digests, sources = [], []
        for i, log in enumerate(logs):
            own = np.load(log.digests)
            own = own[own % np.uint64(parts) == part]
            digests.append(own)
            sources.append(np.full(len(own), i, np.int32))
        digest, source = np.concatenate(digests), np.concatenate(sources)
        order = np.argsort(digest, kind="stable")
        digest, source = digest[order], source[order]
        # The sort is stable, so equal digests stand in the order of their files. A file holds
        # each digest once.
        begin = np.searchsorted(digest, digest)
        later = (begin != np.arange(len(digest))).nonzero()[0]
        for i in later.tolist():
            by_file = found.setdefault(int(source[i]), {})
            earlier = int(source[begin[i]])
            by_file[earlier] = np.append(by_file.get(earlier, digest[:0]), digest[i])
    return dict(sorted(found.items()))


def _write_manifest(
    out: Path, table: dict[str, Any], logs: Sequence[LogFile], records: Sequence[dict[str, Any]]
) -> None:
    """Write the manifest, which makes the folder complete.

    Args:
        out: The folder.
        table: The record of the tracks.
        logs: The log files.
        records: Their records.
    Raises:
        DataError: There is no session.
    """
    splits = {
        split: [
            {
                "file": f"{split}/{log.name}.parquet",
                "bytes": record["bytes"][split],
                "row_groups": record["row_groups"][split],
            }
            for log, record in zip(logs, records, strict=True)
            if record["row_groups"][split]
        ]
        for split in SPLITS
    }
    if not any(splits.values()):
        summary = _summary(table, records)
        first = [examples[0] for examples in summary.examples.values() if examples]
        raise DataError(
            f"{', '.join(str(log.source) for log in logs)}: expected sessions, got none that is "
            f"whole; problems: {summary.counts}. {' '.join(first[:3])}".rstrip()
        )
    digests = {log.name: record["digest"] for log, record in zip(logs, records, strict=True)}
    parts = {
        f"{split}/{log.name}.parquet": record["parts"][split]
        for log, record in zip(logs, records, strict=True)
        for split in SPLITS
        if record["parts"][split]
    }
    content = {"tracks": table["digest"], "logs": digests, "splits": splits}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    manifest = {"format": FORMAT, "digest": digest, "statistics": table["statistics"]} | content
    manifest |= {"parts": parts, "files": table["files"]}
    write_json(out / MANIFEST, sealed(manifest))


def _summary(table: dict[str, Any], records: Sequence[dict[str, Any]]) -> Prepared:
    counts: dict[str, int] = {}
    examples: dict[str, list[str]] = {}
    for problems in (*table["problems"].values(), *(r["problems"] for r in records)):
        for kind, count in problems["counts"].items():
            counts[kind] = counts.get(kind, 0) + count
            examples.setdefault(kind, []).extend(problems["examples"][kind])
    return Prepared(
        tracks=table["tracks"],
        sessions={s: sum(sum(r["row_groups"][s]) for r in records) for s in SPLITS},
        dropped=sum(record["dropped"] for record in records),
        counts=counts,
        examples=examples,
    )


def _bytes(files: Sequence[Path]) -> int | None:
    """How many bytes of csv there are; None of packed files, whose contents' size is unknown."""
    if any(file.suffix != ".csv" for file in files):
        return None
    return sum(file.stat().st_size for file in files if file.is_file())
