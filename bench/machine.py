"""The machine that a result was measured on, as its json names it."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch

import maskmoe_kernels as mk
from bench.clock import cache_bytes
from maskmoe_kernels.experiments.shared import report
from maskmoe_kernels.ops.dispatch import choose

#: Times of machines that differ in any of these cannot be compared directly.
SAME = ("cpu", "cores", "threads", "gpu", "torch", "device")
_ISA = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "asimd")


def machine(device: str) -> dict[str, Any]:
    """Processor, instruction sets, threads, versions, and the backend that computes our layers."""
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


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What differs between two machines, in words."""
    return [f"{name}: {a.get(name)} / {b.get(name)}" for name in SAME if a.get(name) != b.get(name)]


def _gpu(device: torch.device) -> dict[str, Any]:
    """The GPU and the versions that program it; nothing for another device."""
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
