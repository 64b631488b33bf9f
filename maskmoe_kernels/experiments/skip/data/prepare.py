"""From the files of a log to checked parquet shards of sessions, as a schema says.

``prepare`` writes the folder that :mod:`.records` describes and :mod:`.shards` reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from maskmoe_kernels.experiments.shared.progress import shown_bytes
from maskmoe_kernels.experiments.skip.data.columns import MSSD
from maskmoe_kernels.experiments.skip.data.log_file import LogFile
from maskmoe_kernels.experiments.skip.data.log_files import convert_logs
from maskmoe_kernels.experiments.skip.data.manifest import Prepared, summarise, write_manifest
from maskmoe_kernels.experiments.skip.data.prepare_events import prepare_events
from maskmoe_kernels.experiments.skip.data.records import LOGS_FOLDER, MANIFEST, TRACKS_FOLDER
from maskmoe_kernels.experiments.skip.data.shard_format import ROW_GROUP, SPLITS
from maskmoe_kernels.experiments.skip.data.sources import bytes_of, find_sources, find_tables
from maskmoe_kernels.experiments.skip.data.tracks import prepare_table
from maskmoe_kernels.experiments.skip.schema.schema import Schema, Table
from maskmoe_kernels.files import claim

__all__ = ["Prepared", "find_sources", "prepare"]


def prepare(
    sources: Sequence[str | Path],
    out: str | Path,
    schema: Schema = MSSD,
    *,
    strict: bool = False,
    workers: int = 1,
    row_group: int = ROW_GROUP,
    console: Console | None = None,
) -> Prepared:
    """Convert the files in ``sources`` to shards in ``out``.

    A file that an earlier run converted is not converted again, unless the file, the tracks, the
    schema or ``row_group`` changed. Memory: each worker holds a few blocks of a file and a row
    group; while the tracks are read, about 700 bytes a track. Events that are to be sorted: see
    :func:`prepare_events`.

    Args:
        sources: Files, or folders that hold them; see :func:`find_tables`.
        out: Folder of the shards; made if missing.
        schema: What the files hold; the Music Streaming Sessions Dataset by default.
        strict: Stop at the first problem instead of leaving out the session, or of events that
            are to be sorted the row.
        workers: Processes that convert files in parallel.
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
    files = find_tables(sources, schema, out)
    for folder in (out, *(out / name for name in (TRACKS_FOLDER, LOGS_FOLDER, *SPLITS))):
        claim(folder)
    (out / MANIFEST).unlink(missing_ok=True)
    with shown_bytes(console) as open_bar:
        if schema.sessions.by != "file":
            tables, records = prepare_events(
                files, out, schema, strict, workers, row_group, open_bar
            )
        else:
            items = schema.items or Table("", ())
            advance = open_bar("tracks", bytes_of(files["items"]))
            table = prepare_table(items, files["items"], out, strict=strict, advance=advance)
            logs = [
                LogFile(path, out, table["digest"], row_group, strict, schema=schema)
                for path in files["events"]
            ]
            tables, records = {TRACKS_FOLDER: table}, convert_logs(logs, workers, open_bar)
    write_manifest(out, schema, tables, records, files["events"])
    return summarise(tables, records.values())
