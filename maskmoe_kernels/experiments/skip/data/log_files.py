"""Converts all log files whose rows are sessions in order, each session once over all files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from maskmoe_kernels.experiments.shared.progress import OpenBar
from maskmoe_kernels.experiments.skip.data.arrays import UInt64s
from maskmoe_kernels.experiments.skip.data.log_file import LogFile, convert
from maskmoe_kernels.experiments.skip.data.processes import run_all
from maskmoe_kernels.experiments.skip.data.sources import bytes_of

#: Sessions whose digests are compared at a time, in 320 MB.
_COMPARED = 20_000_000


def convert_logs(
    logs: Sequence[LogFile], workers: int, open_bar: OpenBar
) -> dict[str, dict[str, Any]]:
    """Convert log files; those that an earlier run converted are kept.

    Args:
        logs: All log files.
        workers: Processes.
        open_bar: Opens a progress bar.
    Returns:
        Name of each log file -> its record.
    """
    records = _records(logs, workers, open_bar)
    _remove_repeats(logs, records, workers, open_bar)
    return {log.name: record for log, record in zip(logs, records, strict=True)}


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
    bars = [(log.name, bytes_of([log.source])) for log in logs]
    return run_all(logs, convert, bars, workers, open_bar)


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
