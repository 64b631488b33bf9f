"""The table of tracks: raw features in parquet, normalised ones as a matrix to map into memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.files import checksum, replacing
from maskmoe_kernels.experiments.shared.report import read_json, sealed, write_json
from maskmoe_kernels.experiments.skip.data.mssd_columns import (
    TRACK_COLUMNS,
    TRACK_FEATURES,
    UInt64s,
    hash_ids,
)
from maskmoe_kernels.experiments.skip.data.mssd_csv import Array, CsvFile, where

Floats = npt.NDArray[np.float32]

#: Of everything this reader writes; another number is made again.
FORMAT = 2
FOLDER = "tracks"
#: Normalised features further out than this many deviations are moved here.
CLIP = 8.0
_FILES = ("tracks.parquet", "hash.npy", "features.npy")

# Long tails are shortened before mean and deviation are taken: durations and dynamic ranges
# span decades; popularity lies in 90..100 and is piled up below 100, where a logit keeps the most
# popular tracks apart; silence is as good as -40 dB; what is older than 1960 is old.
_TRANSFORMS: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "duration": ("log(x)", np.log),
    "release_year": ("max(x, 1960)", lambda x: np.maximum(x, 1960)),
    "us_popularity_estimate": (
        "log((x - 89.9) / (100.01 - x)), x from 90",
        lambda x: np.log((np.maximum(x, 90) - 89.9) / (100.01 - x)),
    ),
    "dyn_range_mean": ("log(1 + x)", np.log1p),
    "loudness": ("max(x, -40)", lambda x: np.maximum(x, -40)),
}


def normalise(features: Mapping[str, Array]) -> tuple[Floats, dict[str, dict[str, Any]]]:
    """Transform each feature, then subtract its mean over the tracks and divide by its deviation.

    Args:
        features: Raw, feature -> ``(tracks,)``.
    Returns:
        The normalised features in the order of ``TRACK_FEATURES``, ``(tracks, 29)`` float32, and
        per feature ``transform``, ``mean`` and ``std``.
        A feature that is the same for all tracks becomes 0.
    """
    result = np.empty((len(features[TRACK_FEATURES[0]]), len(TRACK_FEATURES)), np.float32)
    statistics: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(TRACK_FEATURES):
        formula, transform = _TRANSFORMS.get(name, ("x", np.asarray))
        values = transform(features[name].astype(np.float64))
        mean, std = float(values.mean()), float(values.std())
        scale = std if std > 1e-9 * max(1.0, abs(mean)) else 1.0
        result[:, i] = np.clip((values - mean) / scale, -CLIP, CLIP)
        statistics[name] = {"transform": formula, "mean": mean, "std": std}
    return result, statistics


def fingerprint(path: Path) -> dict[str, Any]:
    """What shows at a glance whether a file is the one that was read: name, size, time.

    Raises:
        DataError: There is no such file.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: expected a readable file, got {error.strerror}.") from error
    return {"name": path.name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def read_record(path: Path) -> dict[str, Any] | None:
    """The json of a finished step; None where there is none of this format, or a damaged one."""
    try:
        content = read_json(path, "")
    except DataError:
        return None
    return content if content.get("format") == FORMAT else None


def is_whole(path: Path, mark: Mapping[str, int]) -> bool:
    """Is the file there, with the bytes that ``mark`` (see :func:`mark_of`) is of?"""
    return path.is_file() and mark_of(path) == mark


def mark_of(path: Path) -> dict[str, int]:
    """Size and CRC-32 of a file."""
    return {"bytes": path.stat().st_size, "crc32": checksum(path)}


def prepare_tracks(
    sources: Sequence[Path],
    out: Path,
    *,
    strict: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Read ``tf_*.csv`` into ``out/tracks``, unless the same files were read already.

    Writes ``tracks.parquet`` (ids and raw features, by ascending digest of the id), ``hash.npy``
    (those digests, ``(tracks,)`` uint64), ``features.npy`` (:func:`normalise`, ``(tracks, 29)``
    float32) and, last, ``tracks.json``.

    Returns:
        The content of ``tracks.json``.
    Raises:
        DataError: A file cannot be read or lacks a column, no track is left, or ``strict`` and
            something is wrong with a row.
    """
    folder = out / FOLDER
    marks = [fingerprint(source) for source in sources]
    done = read_record(folder / "tracks.json")
    if (
        done
        and done["sources"] == marks
        and not (strict and done["problems"])
        and all(is_whole(folder / name, mark) for name, mark in done["files"].items())
    ):
        return done
    (folder / "tracks.json").unlink(missing_ok=True)
    files = [CsvFile(source, TRACK_COLUMNS, advance) for source in sources]
    ids, digests, features = _read(files, strict)
    table = pa.table({"track_id": ids} | features)
    with replacing(folder / "tracks.parquet") as file:
        pq.write_table(table, file, use_dictionary=False, row_group_size=1 << 17)
    normal, statistics = normalise(features)
    save_array(folder / "hash.npy", digests)
    save_array(folder / "features.npy", normal)
    content = {
        "format": FORMAT,
        "sources": marks,
        "digest": hashlib.sha256("".join(file.digest for file in files).encode()).hexdigest(),
        "tracks": len(digests),
        "statistics": statistics,
        "problems": _merge(files),
        "files": {name: mark_of(folder / name) for name in _FILES},
    }
    write_json(folder / "tracks.json", sealed(content))
    return content


def _read(files: Sequence[CsvFile], strict: bool) -> tuple[Any, UInt64s, dict[str, Floats]]:
    """Ids, their digests and raw features of every good row, the first of each id, by digest."""
    ids: list[Any] = []
    parts: dict[str, list[Floats]] = {name: [] for name in TRACK_FEATURES}
    lines: list[Array] = []
    owners: list[Array] = []
    for number, file in enumerate(files):
        for block in file.blocks():
            file.problems.stop(strict)
            owners.append(np.full(int(block.good.sum()), number))
            for name, part in parts.items():
                part.append(block.values[name][block.good].astype(np.float32))
            ids.append(block.values["track_id"].filter(pa.array(block.good)))
            lines.append(block.lines[block.good])
        file.problems.stop(strict)
    if not sum(map(len, ids)):
        raise DataError(f"{', '.join(str(file.path) for file in files)}: expected tracks, got none")
    names, line = pa.concat_arrays(ids), np.concatenate(lines)
    digest = np.concatenate([hash_ids(part) for part in ids])
    ids.clear()
    order = np.argsort(digest, kind="stable")
    fresh = np.append(True, digest[order[1:]] != digest[order[:-1]])
    again, owner = np.sort(order[~fresh]), np.concatenate(owners)
    for i in np.unique(owner[again]).tolist():
        _note_repeats(files[i], names, line, again[owner[again] == i], strict)
    order = order[fresh]
    # One feature at a time: two copies of all of them would be most of the memory.
    features = {name: np.concatenate(parts.pop(name))[order] for name in TRACK_FEATURES}
    return names.take(pa.array(order)), digest[order], features


def _note_repeats(file: CsvFile, names: Any, line: Array, again: Array, strict: bool) -> None:
    file.problems.add(
        "duplicate track",
        line[again],
        lambda i: where(
            file.path, int(line[again[i]]), "each track once", f"{names[int(again[i])]} again"
        ),
    )
    file.problems.stop(strict)


def _merge(files: Sequence[CsvFile]) -> dict[str, Any]:
    return {
        str(file.path.name): {"counts": file.problems.counts, "examples": file.problems.examples}
        for file in files
        if file.problems.counts
    }


def save_array(path: Path, array: Array) -> None:
    """Write ``.npy``, with the guarantees of :func:`replacing`."""
    with replacing(path) as file:
        np.save(file, array)
