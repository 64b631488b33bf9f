"""The Music Streaming Sessions Dataset: from the official csv files to checked parquet shards.

``prepare`` makes this folder, which :mod:`.sessions` reads; a file whose name starts with
``.unfinished-`` is what a killed run left, and the next run removes it::

    manifest.json           written last: format, digests, statistics of the tracks, and per split
                            the shards with the number of sessions of each row group
    tracks/                 see :mod:`.mssd_tracks`
    train/ valid/ test/     one shard per log file; a row group holds whole sessions
    logs/                   one record per log file; it is there when the file is done
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.files import claim
from maskmoe_kernels.experiments.shared.report import sealed, write_json
from maskmoe_kernels.experiments.skip.data.mssd_columns import UInt64s
from maskmoe_kernels.experiments.skip.data.mssd_shards import ROW_GROUP, SPLITS, Log, convert
from maskmoe_kernels.experiments.skip.data.mssd_tracks import FOLDER, FORMAT, prepare_tracks

#: Sessions whose digests are compared over files at a time: 320 MB.
_TOGETHER = 20_000_000
_REMEDY = "Name the folder that holds the official log_*.csv and tf_*.csv, or those files."


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` found.

    Attributes:
        tracks: Number of tracks.
        sessions: Split -> number of sessions.
        dropped: Sessions left out because something was wrong with them.
        counts: Kind of problem -> number of rows or sessions, over all files.
        examples: Kind of problem -> the first messages, with file and line.
    """

    tracks: int
    sessions: dict[str, int]
    dropped: int
    counts: dict[str, int]
    examples: dict[str, list[str]]


def find_sources(*paths: str | Path) -> tuple[list[Path], list[Path]]:
    """The log files and the track files among ``paths`` and in the folders among them, by name.

    Raises:
        DataError: There is none of either kind, a path is neither, or two have one name.
    """
    logs: set[Path] = set()
    tracks: set[Path] = set()
    for path in map(Path, paths):
        if path.is_dir():
            found = [p for suffix in (".csv", ".csv.gz") for p in path.rglob(f"*{suffix}")]
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
        name = Log(path, Path(), "").name
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
    progress: bool = False,
) -> Prepared:
    """Convert the official csv files in ``sources`` to shards in ``out``.

    A log file that an earlier run finished is not converted again, unless it, the tracks or
    ``row_group`` changed. Memory: a few blocks of csv and a row group a worker; while the
    tracks are read, some 700 bytes a track.

    Args:
        sources: Files, or folders that hold them; see :func:`find_sources`.
        strict: Stop at the first problem instead of leaving out the session.
        workers: Processes that convert log files side by side.
        row_group: Sessions of a row group.
        progress: Show it on the terminal.
    Raises:
        DataError: A file cannot be read or lacks a column, no session is left, or ``strict`` and
            something is wrong; the message names file and line. No manifest is left then.
        ValueError: ``workers`` or ``row_group`` is below 1.
    """
    if workers < 1 or row_group < 1:
        raise ValueError(f"workers and row_group must be at least 1, got {workers}, {row_group}")
    out = Path(out)
    logs, tracks = find_sources(*sources)
    for folder in (out, *(out / name for name in (FOLDER, "logs", *SPLITS))):
        claim(folder)
    (out / "manifest.json").unlink(missing_ok=True)
    with _bars(progress) as bar:
        advance = bar("tracks", tracks)
        table = prepare_tracks(tracks, out, strict=strict, advance=advance)
        work = [Log(path, out, table["digest"], row_group, strict) for path in logs]
        records = _convert_all(work, workers, bar)
        records = _settle(work, records, workers, bar)
    _write_manifest(out, table, work, records)
    return _summary(table, records)


def _convert_all(
    work: Sequence[Log], workers: int, bar: Callable[..., Callable[[int], None]]
) -> list[dict[str, Any]]:
    """The record of each log file, from an earlier run where it still holds."""
    records = [log.done() for log in work]
    digests = {log.name: r["digest"] for log, r in zip(work, records, strict=True) if r}
    for i, record in enumerate(records):
        # What was left out for another file's sake comes back when that file is another now.
        if record and any(digests.get(name) != d for name, d in record["because"].items()):
            records[i] = None
    todo = [i for i, record in enumerate(records) if record is None]
    for i, record in zip(todo, _run([work[i] for i in todo], workers, bar), strict=True):
        records[i] = record
    return [record for record in records if record is not None]


def _run(
    work: Sequence[Log], workers: int, bar: Callable[..., Callable[[int], None]]
) -> list[dict[str, Any]]:
    if len(work) > 1 and workers > 1:
        return _in_processes(work, workers, bar)
    return [convert(log, bar(log.name, [log.source])) for log in work]


def _in_processes(
    work: Sequence[Log], workers: int, bar: Callable[..., Callable[[int], None]]
) -> list[dict[str, Any]]:
    # Spawned, not forked: pyarrow and torch have threads that a fork would lose.
    context = multiprocessing.get_context("spawn")
    done = context.Array(ctypes.c_int64, len(work))
    with ProcessPoolExecutor(
        min(workers, len(work)), mp_context=context, initializer=_share, initargs=(done,)
    ) as pool:
        tasks: list[Future[dict[str, Any]]] = [
            pool.submit(_convert_counted, log, i) for i, log in enumerate(work)
        ]
        advance = [bar(log.name, [log.source]) for log in work]
        shown = [0] * len(work)
        try:
            waiting: set[Future[dict[str, Any]]] = set(tasks)
            while waiting:
                finished, waiting = wait_for(waiting, timeout=0.2)
                for i, count in enumerate(done[:]):
                    advance[i](count - shown[i])
                    shown[i] = count
                for task in finished:
                    task.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [task.result() for task in tasks]


_done: Any = None


def _share(done: Any) -> None:
    global _done
    _done = done


def _convert_counted(log: Log, place: int) -> dict[str, Any]:
    def advance(count: int) -> None:
        _done[place] += count

    return convert(log, advance)


def _settle(
    work: Sequence[Log],
    records: list[dict[str, Any]],
    workers: int,
    bar: Callable[..., Callable[[int], None]],
) -> list[dict[str, Any]]:
    """Convert again, without them, the files that hold sessions an earlier file holds."""
    total = sum(record["sessions"] for record in records)
    repeats = _repeats(work, parts=-(-total // _TOGETHER))
    if not repeats:
        return records
    again = []
    for place, earlier in repeats.items():
        because = {work[i].name: records[i]["digest"] for i in sorted(earlier)}
        excluded = np.unique(np.concatenate([*earlier.values()]))
        again.append(replace(work[place], excluded=excluded, because=because))
        work[place].record.unlink(missing_ok=True)
    fresh = _run(again, workers, bar)
    for place, record in zip(repeats, fresh, strict=True):
        records[place] = record
    return records


def _repeats(work: Sequence[Log], parts: int) -> dict[int, dict[int, UInt64s]]:
    """Log file -> earlier log file -> digests of the sessions that both hold."""
    found: dict[int, dict[int, UInt64s]] = {}
    for part in range(parts):
        digests, owners = [], []
        for i, log in enumerate(work):
            own = np.load(log.digests)
            own = own[own % np.uint64(parts) == part]
            digests.append(own)
            owners.append(np.full(len(own), i, np.int32))
        every, owner = np.concatenate(digests), np.concatenate(owners)
        order = np.argsort(every, kind="stable")
        every, owner = every[order], owner[order]
        # A run of equal digests begins with its earliest file; no file holds one twice.
        begin = np.searchsorted(every, every)
        later = (begin != np.arange(len(every))).nonzero()[0]
        for i in later.tolist():
            pair = found.setdefault(int(owner[i]), {})
            earlier = int(owner[begin[i]])
            pair[earlier] = np.append(pair.get(earlier, every[:0]), every[i])
    return dict(sorted(found.items()))


def _write_manifest(
    out: Path, table: dict[str, Any], work: Sequence[Log], records: Sequence[dict[str, Any]]
) -> None:
    splits = {
        split: [
            {
                "file": f"{split}/{log.name}.parquet",
                "bytes": record["bytes"][split],
                "row_groups": record["row_groups"][split],
            }
            for log, record in zip(work, records, strict=True)
            if record["row_groups"][split]
        ]
        for split in SPLITS
    }
    if not any(splits.values()):
        counts = _summary(table, records).counts
        raise DataError(
            f"{', '.join(str(log.source) for log in work)}: expected sessions, got none that is "
            f"whole; problems: {counts}. Use strict to see the first."
        )
    digests = {log.name: record["digest"] for log, record in zip(work, records, strict=True)}
    parts = {
        f"{split}/{log.name}.parquet": record["parts"][split]
        for log, record in zip(work, records, strict=True)
        for split in SPLITS
        if record["parts"][split]
    }
    content = {"tracks": table["digest"], "logs": digests, "splits": splits}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    manifest = {"format": FORMAT, "digest": digest, "statistics": table["statistics"]} | content
    manifest |= {"parts": parts, "files": table["files"]}
    write_json(out / "manifest.json", sealed(manifest))


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


@contextmanager
def _bars(shown: bool) -> Iterator[Callable[[str, Sequence[Path]], Callable[[int], None]]]:
    """A function that opens a progress bar over the bytes of files."""
    columns = (
        TextColumn("{task.description}"), BarColumn(),
        TextColumn("{task.percentage:3.0f} %"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bars:

        def open_bar(name: str, files: Sequence[Path]) -> Callable[[int], None]:
            # Of gzip only the packed size is known: the bar is without an end then.
            packed = any(file.suffix == ".gz" for file in files)
            total = None if packed else sum(f.stat().st_size for f in files if f.is_file())
            task: TaskID = bars.add_task(name, total=total)
            return lambda count: bars.advance(task, count)

        yield open_bar
