"""Which backend runs, and why another does not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from maskmoe_kernels.errors import BackendError
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.ops import native
from maskmoe_kernels.ops import triton_support as triton
from maskmoe_kernels.ops.triton_support.limits import DTYPES

#: Fastest first; ``None`` takes the first that can run.
BACKENDS: tuple[str, ...] = ("triton", "native", "grouped", "reference")

DESCRIPTIONS: dict[str, str] = {
    "triton": "Triton kernels for NVIDIA GPUs",
    "native": "C++ kernels for the CPU",
    "grouped": "PyTorch, one matrix product per run of present blocks",
    "reference": "plain differentiable PyTorch: slow, for double backward and torch.func",
}


#: What ``layout.too_fine`` means to whom it stops.
TOO_FINE = (
    "its layout has too many blocks of too few weights, more than 65,536 of less than 16 on "
    "average: tables of them would be larger than the weights"
)


def obstacle(name: str, x: Tensor, layout: BlockLayout | None = None) -> str | None:
    """Why backend ``name`` cannot run on ``x``, in words for the user; None when it can.

    Without a ``layout``: on one that every backend takes.
    """
    if not x.is_floating_point():
        return f"x is {x.dtype}; convert it to a floating-point type first"
    if name == "triton":
        return _dtype_obstacle(x) or triton.obstacle(x.device)
    if name == "native":
        if x.device.type not in ("cpu", "meta"):
            return f"x is on {x.device}; these kernels are for the CPU"
        fine = layout is not None and layout.too_fine
        return _dtype_obstacle(x) or native.OBSTACLE or (TOO_FINE if fine else None)
    return None


def _dtype_obstacle(x: Tensor) -> str | None:
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; these kernels compute in float32, bfloat16 and float16"
    return None


def check_backend(backend: str | None) -> None:
    """Raise BackendError unless ``backend`` is None or a name that exists."""
    if backend is not None and backend not in BACKENDS:
        raise BackendError(f"backend must be None or one of {list(BACKENDS)}, got {backend!r}")


def choose(backend: str | None, x: Tensor, layout: BlockLayout | None = None) -> str:
    """The backend to run on ``x``: the named one, or the fastest that can.

    Raises:
        BackendError: An unknown name, or a named backend that cannot run on ``x`` and ``layout``.
    """
    if backend is None:
        # Triton's interpreter is a test bench: on the CPU, it runs where it is named.
        for name in BACKENDS if x.is_cuda else BACKENDS[1:]:
            if obstacle(name, x, layout) is None:
                return name
        raise BackendError(f"no backend can run: {obstacle(BACKENDS[-1], x)}")
    check_backend(backend)
    reason = obstacle(backend, x, layout)
    if reason is not None:
        raise BackendError(f"backend {backend!r} cannot run: {reason}")
    return backend


def warn_of_fallback(name: str, x: Tensor, layout: BlockLayout) -> None:
    """Say once why ``x`` takes the PyTorch path, if kernels for its device are not to be had."""
    if name == "grouped" and _dtype_obstacle(x) is None and x.device.type in ("cpu", "cuda"):
        best = "triton" if x.is_cuda else "native"
        reason = obstacle(best, x, layout)
        _warn_once(f"masked_linear runs in plain PyTorch: no {best} kernels, {reason}")


@cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=5)


def info() -> dict[str, Any]:
    """Versions, and every backend with what it is and why it cannot run here (None: it can)."""
    cuda = torch.cuda.is_available()
    probes = {"triton": torch.empty(0, device="cuda" if cuda else "cpu")}
    return {
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton")
        if importlib.util.find_spec("triton")
        else None,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "isa": {"used": native.isa(), "available": native.isas()},
        "build": native.build_record(),
        "cuda": torch.cuda.get_device_name() if cuda else None,
        "networks": {
            "description": "whole networks as one op, in C++ and CUDA",
            "obstacle": native.OBSTACLE,
            "cuda": native.CUDA_OBSTACLE,
        },
        "backends": {
            name: {
                "description": DESCRIPTIONS[name],
                "obstacle": obstacle(name, probes.get(name, torch.empty(0))),
            }
            for name in BACKENDS
        },
    }
