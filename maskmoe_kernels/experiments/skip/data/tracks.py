"""The table of tracks: raw features in parquet, normalised features in a memory-mappable matrix."""

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
from maskmoe_kernels.experiments.skip.data.columns import TRACK_COLUMNS, TRACK_FEATURES
from maskmoe_kernels.experiments.skip.data.csv_file import CsvFile, line_message
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
from maskmoe_kernels.files import replacing

#: Normalised features are clipped to at most this many standard deviations.
CLIP = 8.0
#: Files of the table, and the record that is written last.
TRACKS, DIGESTS, FEATURES = "tracks.parquet", "hash.npy", "features.npy"
_RECORD = "tracks.json"

# Transforms that shorten long tails before mean and deviation are computed. Durations and dynamic
# ranges span decades. Popularity lies in 90..100, with most tracks just below 100, which a logit
# separates. Loudness below -40 dB and years before 1960 carry no further information.
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
    """Transform each feature, subtract its mean over the tracks, divide by its standard deviation.

    Args:
        features: Raw features, name -> ``(tracks,)``.
    Returns:
        The normalised features in the order of ``TRACK_FEATURES``, ``(tracks, 29)`` float32, and
        ``transform``, ``mean`` and ``std`` of each feature. A feature that is the same for all
        tracks becomes 0.
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


def prepare_tracks(
    sources: Sequence[Path],
    out: Path,
    *,
    strict: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Read ``tf_*.csv`` into the folder of tracks, unless it holds these files already.

    Writes ``tracks.parquet`` (ids and raw features, by ascending digest of the id), ``hash.npy``
    (those digests, ``(tracks,)`` uint64), ``features.npy`` (:func:`normalise`, ``(tracks, 29)``
    float32) and, last, the record ``tracks.json``.

    Args:
        sources: The csv files.
        out: The folder of the shards; the tracks go into its subfolder ``tracks``.
        strict: Stop at the first problem instead of dropping the row.
        advance: Called with the number of bytes just read.
    Returns:
        The content of ``tracks.json``.
    Raises:
        DataError: A file cannot be read or lacks a column, no track is left, or ``strict`` and
            a row has a problem.
    """
    folder = out / TRACKS_FOLDER
    fingerprints = [fingerprint(source) for source in sources]
    done = read_record(folder / _RECORD)
    if (
        done
        and done["sources"] == fingerprints
        and not (strict and done["problems"])
        and all(is_intact(folder / name, expected) for name, expected in done["files"].items())
    ):
        return done
    (folder / _RECORD).unlink(missing_ok=True)
    files = [CsvFile(source, TRACK_COLUMNS, advance) for source in sources]
    ids, digests, features = _read(files, strict)
    table = pa.table({"track_id": ids} | features)
    with replacing(folder / TRACKS) as file:
        pq.write_table(table, file, use_dictionary=False, row_group_size=1 << 17)
    normal, statistics = normalise(features)
    save_array(folder / DIGESTS, digests)
    save_array(folder / FEATURES, normal)
    content = {
        "format": FORMAT,
        "sources": fingerprints,
        "digest": hashlib.sha256("".join(file.digest for file in files).encode()).hexdigest(),
        "tracks": len(digests),
        "statistics": statistics,
        "problems": _problems(files),
        "files": {name: size_and_checksum(folder / name) for name in (TRACKS, DIGESTS, FEATURES)},
    }
    write_json(folder / _RECORD, sealed(content))
    return content


def _read(files: Sequence[CsvFile], strict: bool) -> tuple[Any, UInt64s, dict[str, Floats]]:
    """Ids, digests and raw features of the valid rows, sorted by digest.

    Of several rows with one id the first counts; the others are problems.
    """
    ids: list[Any] = []
    parts: dict[str, list[Floats]] = {name: [] for name in TRACK_FEATURES}
    lines: list[Array] = []
    sources: list[Array] = []  # of each row, the index of its file
    for number, file in enumerate(files):
        for block in file.blocks():
            file.problems.raise_first(strict)
            sources.append(np.full(int(block.valid.sum()), number))
            for name, part in parts.items():
                part.append(block.values[name][block.valid].astype(np.float32))
            ids.append(block.values["track_id"].filter(pa.array(block.valid)))
            lines.append(block.lines[block.valid])
        file.problems.raise_first(strict)
    if not sum(map(len, ids)):
        first = [examples[0] for f in files for examples in f.problems.examples.values()]
        raise DataError(
            f"{', '.join(str(file.path) for file in files)}: expected tracks, got none that is "
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
    features = {name: np.concatenate(parts.pop(name))[order] for name in TRACK_FEATURES}
    return names.take(pa.array(order)), digest[order], features


def _add_repeats(file: CsvFile, names: Any, line: Array, repeats: Array, strict: bool) -> None:
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


def _problems(files: Sequence[CsvFile]) -> dict[str, Any]:
    """File name -> its problems, for the files that have any."""
    return {
        str(file.path.name): {"counts": file.problems.counts, "examples": file.problems.examples}
        for file in files
        if file.problems.counts
    }
