"""The json file of a run: the machine, the settings, and every case measured so far."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.cases import Case
from bench.layers.ratios import case_of
from bench.machine import differences
from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.report import write_json

FORMAT = 2
NAME = "bench.json"
GPU_LOST = "lost the GPU:"  # such a case is not tried again when a run is resumed


def load(path: Path) -> dict[str, Any]:
    """A document written by :func:`save`.

    Raises:
        DataError: It cannot be read, is not json, or is of another format.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}; give a {NAME} that `python -m bench` wrote"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a json file: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise DataError(
            f"{path}: expected a benchmark of format {FORMAT}; measure again with this version"
        )
    if "roofs" in document:  # the name in earlier files of this format
        document["peak_rates"] = document.pop("roofs")
    return document


def save(path: Path, document: dict[str, Any]) -> None:
    """Write atomically: a run that is killed leaves the last complete file."""
    write_json(path, document)


def start(
    path: Path, here: dict[str, Any], settings: dict[str, Any], resume: bool
) -> dict[str, Any]:
    """A document without results, or with those in ``path`` where ``resume`` finds it.

    Raises:
        DataError: ``path`` was measured on another machine, or cannot be read.
    """
    document: dict[str, Any] = {
        "format": FORMAT,
        "machine": here,
        "settings": settings,
        "peak_rates": {},
        "results": [],
        "skipped": {},
        "summary": {},
    }
    if not (resume and path.exists()):
        return document
    old = load(path)
    different = differences(old["machine"], here)
    if different:
        raise DataError(
            f"{path}: cannot be resumed, it was measured elsewhere ({'; '.join(different)}); use "
            "another --out"
        )
    skipped = {c: why for c, why in old["skipped"].items() if why.startswith(GPU_LOST)}
    kept = {name: old[name] for name in ("results", "peak_rates")}
    return document | kept | {"skipped": skipped}


def finished(document: dict[str, Any]) -> set[Case]:
    """Cases with a result."""
    return {case_of(result) for result in document["results"]}
