"""The tables of items and users: raw features in parquet, normalised ones in a mappable matrix."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.report import sealed, write_json
from maskmoe_kernels.experiments.skip.data.arrays import Array, Floats, UInt64s
from maskmoe_kernels.experiments.skip.data.arrow_file import ArrowFile, open_table
from maskmoe_kernels.experiments.skip.data.block import line_message
from maskmoe_kernels.experiments.skip.data.columns import MSSD
from maskmoe_kernels.experiments.skip.data.csv_file import CsvFile
from maskmoe_kernels.experiments.skip.data.ids import hash_ids
from maskmoe_kernels.experiments.skip.data.records import (
    FORMAT,
    TRACKS_FOLDER,
    fingerprint,
    is_intact,
    read_record,
    save_array,
    size_and_checksum,
)
from maskmoe_kernels.experiments.skip.schema.column import Column
from maskmoe_kernels.experiments.skip.schema.schema import Table
from maskmoe_kernels.files import replacing

#: Normalised features are clipped to at most this many standard deviations.
CLIP = 8.0
_MSSD_TRACKS = MSSD.items or Table("", ())
#: Files of the table, and the record that is written last.
TRACKS, DIGESTS, FEATURES = "tracks.parquet", "hash.npy", "features.npy"
_RECORD = "tracks.json"
#: Of the users: whether they have sessions in training.
KNOWN = "known.npy"


def _transform(column: Column, values: Array) -> tuple[Array, str]:
    """The values after the column's transform, which shortens long tails, and its formula."""
    formula = "x"
    if column.least is not None:
        values, formula = np.maximum(values, column.least), f"max(x, {column.least:g})"
    if column.logit is not None:
        a, b = column.logit
        values, formula = np.log((values - a) / (b - values)), f"log((x - {a:g}) / ({b:g} - x))"
        formula += "" if column.least is None else f", x from {column.least:g}"
    elif column.log:
        plus = column.log == "1p"
        values = np.log1p(values) if plus else np.log(values)
        formula = formula.replace("x", "1 + x" if plus else "x")
        formula = f"log({formula})"
    return values, formula


def normalise(
    features: Mapping[str, Array], table: Table = _MSSD_TRACKS
) -> tuple[Floats, dict[str, dict[str, Any]]]:
    """Transform each feature, subtract its mean over the rows, divide by its standard deviation.

    A column of names becomes a column for each name, 0 or 1, as it is.

    Args:
        features: Raw features, name -> ``(rows,)``.
        table: The table they are of.
    Returns:
        The normalised features in the order of ``table.features``, ``(rows, columns)`` float32,
        and ``transform``, ``mean`` and ``std`` of each feature that is normalised. A feature that
        is the same in all rows becomes 0.
    """
    width = sum(map(len, table.features.values()))
    rows = len(next(iter(features.values()))) if features else 0
    result = np.empty((rows, width), np.float32)
    statistics: dict[str, dict[str, Any]] = {}
    for name, place in table.places.items():
        column = table.by_name[name]
        if column.one_hot:
            result[:, place] = np.arange(len(column.names)) == features[name][:, None]
            continue
        values, formula = _transform(column, features[name].astype(np.float64))
        mean, std = float(values.mean()), float(values.std())
        scale = std if std > 1e-9 * max(1.0, abs(mean)) else 1.0
        result[:, place] = np.clip((values - mean) / scale, -CLIP, CLIP)[:, None]
        statistics[name] = {"transform": formula, "mean": mean, "std": std}
    return result, statistics


def prepare_table(
    table: Table,
    sources: Sequence[Path],
    out: Path,
    name: str = TRACKS_FOLDER,
    *,
    strict: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Read a table of items or users into a folder, unless that holds these files already.

    Writes ``tracks.parquet`` (ids and raw features, by ascending digest of the id), ``hash.npy``
    (those digests, ``(rows,)`` uint64), ``features.npy`` (:func:`normalise`, float32) and, last,
    the record ``tracks.json``.

    Args:
        table: The table.
        sources: Its files.
        out: The folder of the shards.
        name: Of the subfolder of the table.
        strict: Stop at the first problem instead of dropping the row.
        advance: Called with the number of bytes just read.
    Returns:
        The content of ``tracks.json``.
    Raises:
        DataError: A file cannot be read or lacks a column, no row is left, or ``strict`` and
            a row has a problem.
    """
    folder = out / name
    fingerprints = [fingerprint(source) for source in sources]
    done = read_record(folder / _RECORD)
    if (
        done
        and done["sources"] == fingerprints
        and done["table"] == repr(table)
        and not (strict and done["problems"])
        and all(is_intact(folder / file, expected) for file, expected in done["files"].items())
    ):
        return done
    (folder / _RECORD).unlink(missing_ok=True)
    files = [open_table(source, table.columns, advance) for source in sources]
    ids, digests, features = _read(table, files, strict)
    content = write_table(table, folder, ids, digests, features)
    content |= {
        "sources": fingerprints,
        "digest": hashlib.sha256("".join(file.digest for file in files).encode()).hexdigest(),
        "problems": _problems(files),
    }
    write_json(folder / _RECORD, sealed(content))
    return content


def write_table(
    table: Table, folder: Path, ids: Any, digests: UInt64s, features: Mapping[str, Array]
) -> dict[str, Any]:
    """Write the files of a table but its record.

    Args:
        table: The table.
        folder: Where they go.
        ids: pyarrow strings by ascending digest, ``(rows,)``.
        digests: Their digests, ``(rows,)``.
        features: Raw features, name -> ``(rows,)``.
    Returns:
        What the record says of them.
    """
    with replacing(folder / TRACKS) as file:
        rows = pa.table({table.key: ids} | dict(features))
        pq.write_table(rows, file, use_dictionary=False, row_group_size=1 << 17)
    normal, statistics = normalise(features, table)
    save_array(folder / DIGESTS, digests)
    save_array(folder / FEATURES, normal if features else np.zeros((len(digests), 0), np.float32))
    return {
        "format": FORMAT,
        "table": repr(table),
        "tracks": len(digests),
        "statistics": statistics,
        "files": {name: size_and_checksum(folder / name) for name in (TRACKS, DIGESTS, FEATURES)},
    }


def _read(
    table: Table, files: Sequence[CsvFile | ArrowFile], strict: bool
) -> tuple[Any, UInt64s, dict[str, Floats]]:
    """Ids, digests and raw features of the valid rows, sorted by digest.

    Of several rows with one id the first counts; the others are problems.
    """
    ids: list[Any] = []
    parts: dict[str, list[Floats]] = {name: [] for name in table.features}
    lines: list[Array] = []
    sources: list[Array] = []  # of each row, the index of its file
    for number, file in enumerate(files):
        for block in file.blocks():
            file.problems.raise_first(strict)
            sources.append(np.full(int(block.valid.sum()), number))
            for name, part in parts.items():
                part.append(block.values[name][block.valid].astype(np.float32))
            ids.append(block.values[table.key].filter(pa.array(block.valid)))
            lines.append(block.lines[block.valid])
        file.problems.raise_first(strict)
    if not sum(map(len, ids)):
        what = "tracks" if table.key == "track_id" else f"rows with {table.key}"
        first = [examples[0] for f in files for examples in f.problems.examples.values()]
        raise DataError(
            f"{', '.join(str(file.path) for file in files)}: expected {what}, got none that is "
            f"valid. {' '.join(first[:1])}".rstrip()
        )
    names, line = pa.concat_arrays(ids), np.concatenate(lines)
    digest = np.concatenate([hash_ids(part) for part in ids])
    ids.clear()
    order = np.argsort(digest, kind="stable")
    is_first = np.append(True, digest[order[1:]] != digest[order[:-1]])
    repeats, source = np.sort(order[~is_first]), np.concatenate(sources)
    for i in np.unique(source[repeats]).tolist():
        _add_repeats(files[i], names, line, repeats[source[repeats] == i], strict)
    order = order[is_first]
    # Pop one feature at a time: two copies of all of them would double the memory.
    features = {name: np.concatenate(parts.pop(name))[order] for name in list(parts)}
    return names.take(pa.array(order)), digest[order], features


def _add_repeats(
    file: CsvFile | ArrowFile, names: Any, line: Array, repeats: Array, strict: bool
) -> None:
    """Report the rows ``repeats``, whose ids earlier rows have."""
    file.problems.add(
        "duplicate track",
        line[repeats],
        lambda i: line_message(
            file.path,
            int(line[repeats[i]]),
            "each track once",
            f"{names[int(repeats[i])]} again",
            "The first counts; remove the other.",
        ),
    )
    file.problems.raise_first(strict)


def _problems(files: Sequence[CsvFile | ArrowFile]) -> dict[str, Any]:
    """File name -> its problems, for the files that have any."""
    return {
        str(file.path.name): {"counts": file.problems.counts, "examples": file.problems.examples}
        for file in files
        if file.problems.counts
    }
