"""Which backend runs, and why another does not."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor

from maskmoe_kernels.backends import native
from maskmoe_kernels.errors import BackendError

#: Fastest first; ``None`` takes the first that can run.
BACKENDS: tuple[str, ...] = ("native", "grouped", "reference")

DESCRIPTIONS: dict[str, str] = {
    "native": "C++ kernels for the CPU",
    "grouped": "PyTorch, one matrix product per run of present blocks",
    "reference": "plain differentiable PyTorch: slow, for double backward and torch.func",
}


def obstacle(name: str, x: Tensor) -> str | None:
    """Why backend ``name`` cannot run on ``x``, in words for the user; None when it can."""
    if not x.is_floating_point():
        return f"x is {x.dtype}; convert it to a floating-point type first"
    if name == "native":
        return _native_obstacle(x)
    return None


def _native_obstacle(x: Tensor) -> str | None:
    if x.device.type not in ("cpu", "meta"):
        return f"x is on {x.device}; these kernels are for the CPU"
    if x.dtype not in native.DTYPES:
        return f"x is {x.dtype}; these kernels compute in float32, bfloat16 and float16"
    return native.OBSTACLE


def check_backend(backend: str | None) -> None:
    """Raise BackendError unless ``backend`` is None or a name that exists."""
    if backend is not None and backend not in BACKENDS:
        raise BackendError(f"backend must be None or one of {list(BACKENDS)}, got {backend!r}")


def choose(backend: str | None, x: Tensor) -> str:
    """The backend to run on ``x``: the named one, or the fastest that can.

    Raises:
        BackendError: An unknown name, or a named backend that cannot run on ``x``.
    """
    if backend is None:
        for name in BACKENDS:
            if obstacle(name, x) is None:
                return name
        raise BackendError(f"no backend can run: {obstacle(BACKENDS[-1], x)}")
    check_backend(backend)
    reason = obstacle(backend, x)
    if reason is not None:
        raise BackendError(f"backend {backend!r} cannot run: {reason}")
    return backend


def info() -> dict[str, Any]:
    """Versions, and every backend with what it is and why it cannot run here (None: it can)."""
    probe = torch.empty(0)
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "isa": {"used": native.isa(), "available": native.isas()},
        "build": native.build_record(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backends": {
            name: {"description": DESCRIPTIONS[name], "obstacle": obstacle(name, probe)}
            for name in BACKENDS
        },
    }
