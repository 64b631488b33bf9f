"""The file of a run: on which machine, with which settings, and every case so far."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch

import maskmoe_kernels as mk
from bench.clock import cache_bytes
from bench.layers.ratios import case_of
from bench.shapes import Case
from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared import report
from maskmoe_kernels.ops.dispatch import choose

FORMAT = 2
NAME = "bench.json"
GPU_LOST = "lost the GPU:"  # not tried again when a run is resumed
#: Times of machines that differ in any of these cannot be compared directly.
SAME = ("cpu", "cores", "threads", "gpu", "torch", "device")
_ISA = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "asimd")


def machine(device: str) -> dict[str, Any]:
    """Processor, instruction sets, threads, versions, and what computes our layers."""
    info = mk.info()
    return {
        **report.machine(),
        "device": device,
        **_gpu(torch.device(device)),
        "isa": {"torch": torch.backends.cpu.get_cpu_capability(), "cpu": _cpu_flags()},
        "maskmoe_kernels": mk.__version__,
        "backend": backend_on(device),
        "info": json.loads(json.dumps(info, default=str)),
    }


def backend_on(device: str) -> str:
    """The backend that ``backend=None`` chooses for float32 on ``device``."""
    return choose("masked_linear", None, None, (torch.empty(0, device=device),))


def _gpu(device: torch.device) -> dict[str, Any]:
    """The GPU and what programs it; nothing for another device."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "gpu_properties": {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "l2": cache_bytes(device),
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_flags() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    words = next((x.split() for x in lines if x.startswith(("flags", "Features"))), [])
    return [flag for flag in _ISA if flag in words]


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """In what two machines differ, in words."""
    return [f"{name}: {a.get(name)} / {b.get(name)}" for name in SAME if a.get(name) != b.get(name)]


def load(path: Path) -> dict[str, Any]:
    """A document written by :func:`save`.

    Raises:
        DataError: Not json, or of another format.
        OSError: It cannot be read.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a json file: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise DataError(
            f"{path}: expected a benchmark of format {FORMAT}; measure again with this version"
        )
    return document


def save(path: Path, document: dict[str, Any]) -> None:
    """Write atomically: a run that is killed leaves the last whole file."""
    report.write_json(path, document)


def start(
    path: Path, here: dict[str, Any], settings: dict[str, Any], resume: bool
) -> dict[str, Any]:
    """A document with no result, or with the results of ``path`` where ``resume`` finds it.

    Raises:
        DataError: ``path`` was measured on another machine, or cannot be read.
    """
    document: dict[str, Any] = {
        "format": FORMAT,
        "machine": here,
        "settings": settings,
        "roofs": {},
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
    return document | {"results": old["results"], "roofs": old["roofs"], "skipped": skipped}


def finished(document: dict[str, Any]) -> set[Case]:
    """Cases with a result."""
    return {case_of(result) for result in document["results"]}
