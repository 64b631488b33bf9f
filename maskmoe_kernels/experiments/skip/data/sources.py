"""Finds the files of each table of a schema."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.skip.data.columns import MSSD
from maskmoe_kernels.experiments.skip.data.packed import ENDINGS, ROW_ENDINGS, stem
from maskmoe_kernels.experiments.skip.schema.schema import Schema


def find_sources(*paths: str | Path) -> tuple[list[Path], list[Path]]:
    """The log files and the track files of the Music Streaming Sessions Dataset.

    Args:
        paths: Files, or folders that are searched with their subfolders.
    Raises:
        DataError: As :func:`find_tables`.
    """
    found = find_tables(paths, MSSD)
    return found["events"], found["items"]


def find_tables(
    paths: Sequence[str | Path], schema: Schema, out: Path | None = None
) -> dict[str, list[Path]]:
    """Find the files of each table: those whose name, or a folder on the way, has its pattern.

    Args:
        paths: Files, or folders that are searched with their subfolders.
        schema: The schema.
        out: Folder of the shards; files in it are none of the tables', where it is in a folder that
            is searched.
    Returns:
        ``"events"``, ``"items"``, ``"users"`` and the names of relations -> the files, sorted by
        name.
    Raises:
        DataError: A path does not exist, there is no file of a table, or two files of the events
            have the same name.
    """
    patterns = {"events": schema.events.files}
    for name, table in (("items", schema.items), ("users", schema.users)):
        if table is not None:
            patterns[name] = table.files
    patterns |= {name: relation.files for name, relation in schema.relations.items()}
    wanted = [f"{pattern}.csv" for pattern in patterns.values()]
    archives = "archives (`tar -xf`, `unzip`), or those files."
    kind = "official " if schema.name == MSSD.name else ""
    remedy = f"Name the folder that holds the {kind}{' and '.join(wanted)}, unpacked from their "
    remedy += archives
    found: dict[str, set[Path]] = {name: set() for name in patterns}
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path}: expected a file or a folder, got nothing there. {remedy}")
        files = [path]
        if path.is_dir():
            files = [p for ending in (*ENDINGS, *ROW_ENDINGS) for p in path.rglob(f"*{ending}")]
        for file in files:
            if out is not None and out.resolve() in file.resolve().parents:
                continue
            inside = file.relative_to(path).parts[:-1] if path.is_dir() else ()
            for name, pattern in patterns.items():
                if any(fnmatch(part, pattern) for part in (*inside, stem(file))):
                    found[name].add(file)
    for name, pattern in patterns.items():
        if not found[name]:
            named = ", ".join(map(str, paths))
            other = "" if schema.name == MSSD.name else ", .parquet or .arrow"
            raise DataError(
                f"{named}: expected a {pattern}.csv (or .csv.gz{other}), got none. {remedy}"
            )
    for name in ("events", *schema.relations):
        _check_names(found[name])
    return {name: sorted(files, key=lambda p: p.name) for name, files in found.items()}


def _check_names(files: set[Path]) -> None:
    by_name: dict[str, Path] = {}
    for path in sorted(files):
        name = stem(path)
        if name in by_name:
            raise DataError(
                f"{path} and {by_name[name]}: expected log files of different names, for the "
                f"shards are named after them, got {name} twice. Leave one out or rename it."
            )
        by_name[name] = path


def bytes_of(files: Sequence[Path]) -> int | None:
    """How many bytes there are; None of packed files, whose contents' size is unknown."""
    if any(file.suffix not in (".csv", *ROW_ENDINGS) for file in files):
        return None
    return sum(file.stat().st_size for file in files if file.is_file())
