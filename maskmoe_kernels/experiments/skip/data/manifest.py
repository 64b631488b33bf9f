"""The manifest of prepared sessions, which makes their folder complete, and a summary."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.report import sealed, write_json
from maskmoe_kernels.experiments.skip.data.records import (
    FORMAT,
    MANIFEST,
    TRACKS_FOLDER,
    USERS_FOLDER,
)
from maskmoe_kernels.experiments.skip.data.shard_format import SPLITS
from maskmoe_kernels.experiments.skip.schema.schema import Schema


@dataclass(frozen=True)
class Prepared:
    """The result of :func:`prepare`.

    Attributes:
        tracks: Number of tracks.
        sessions: Split -> number of sessions.
        dropped: Number of sessions that were left out: because of a problem, or their length.
        counts: Kind of problem -> number of rows or sessions, over all files.
        examples: Kind of problem -> the first messages, with file and line.
    """

    tracks: int
    sessions: dict[str, int]
    dropped: int
    counts: dict[str, int]
    examples: dict[str, list[str]]


def write_manifest(
    out: Path,
    schema: Schema,
    tables: Mapping[str, dict[str, Any]],
    records: Mapping[str, dict[str, Any]],
    sources: Sequence[Path],
) -> None:
    """Write the manifest, which makes the folder complete.

    Args:
        out: The folder.
        schema: The schema.
        tables: Folder of a table -> its record.
        records: Name of a part of the sessions -> its record; its shards have the same name.
        sources: The files that hold the events, for messages.
    Raises:
        DataError: There is no session.
    """
    splits = {
        split: [
            {
                "file": f"{split}/{name}.parquet",
                "bytes": record["bytes"][split],
                "row_groups": record["row_groups"][split],
            }
            for name, record in records.items()
            if record["row_groups"][split]
        ]
        for split in SPLITS
    }
    if not any(splits.values()):
        summary = summarise(tables, records.values())
        first = [examples[0] for examples in summary.examples.values() if examples]
        raise DataError(
            f"{', '.join(map(str, sources))}: expected sessions, got none that is "
            f"whole; problems: {summary.counts}. {' '.join(first[:3])}".rstrip()
        )
    digests = {name: record["digest"] for name, record in records.items()}
    parts = {
        f"{split}/{name}.parquet": record["parts"][split]
        for name, record in records.items()
        for split in SPLITS
        if record["parts"][split]
    }
    content = {"tracks": tables[TRACKS_FOLDER]["digest"], "logs": digests, "splits": splits}
    if USERS_FOLDER in tables:
        content |= {"users": tables[USERS_FOLDER]["digest"], "schema": schema.data}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    statistics = {name: table["statistics"] for name, table in tables.items()}
    manifest = {"format": FORMAT, "digest": digest, "schema": schema.text}
    manifest |= {"statistics": statistics.pop(TRACKS_FOLDER), "users_statistics": statistics}
    manifest |= content | {"schema": schema.text, "parts": parts}
    manifest |= {"files": {name: table["files"] for name, table in tables.items()}}
    write_json(out / MANIFEST, sealed(manifest))


def summarise(
    tables: Mapping[str, dict[str, Any]], records: Collection[dict[str, Any]]
) -> Prepared:
    """Counts and problems of all tables and parts."""
    counts: dict[str, int] = {}
    examples: dict[str, list[str]] = {}
    of_tables = [p for table in tables.values() for p in table["problems"].values()]
    for problems in (*of_tables, *(record["problems"] for record in records)):
        for kind, count in problems["counts"].items():
            counts[kind] = counts.get(kind, 0) + count
            examples.setdefault(kind, []).extend(problems["examples"].get(kind, []))
    return Prepared(
        tracks=tables[TRACKS_FOLDER]["tracks"],
        sessions={s: sum(sum(r["row_groups"][s]) for r in records) for s in SPLITS},
        dropped=sum(record["dropped"] for record in records),
        counts=counts,
        examples=examples,
    )
