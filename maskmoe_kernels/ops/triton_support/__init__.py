"""Triton kernels: whether they can run here, and why not.

Importing this package does not import Triton; ``launch`` does, on the first call.
``TRITON_INTERPRET=1`` (Triton's own variable, read once, when the kernels are imported) runs them
on the CPU, slowly, for tests.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

import numpy as np
import torch

from maskmoe_kernels._compat import constant_in_trace

#: The kernels run on the CPU, in Triton's interpreter.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

_MISSING = (
    None
    if importlib.util.find_spec("triton")
    else "Triton is not installed; `pip install maskmoe_kernels[triton]` (Linux only)"
)


def _interpreter_reason(triton: str, numpy: str) -> str | None:
    # Before 3.7, it takes arrays of one element for integers; numpy does so no longer from 2.4 on.
    if np.lib.NumpyVersion(triton) < "3.7.0" and np.lib.NumpyVersion(numpy) >= "2.4.0":
        return (
            f"the interpreter of Triton {triton} does not work with numpy {numpy}; "
            "`pip install 'numpy<2.4'`, or 'triton>=3.7'"
        )
    return None


_INTERPRETER = (
    _interpreter_reason(importlib.metadata.version("triton"), np.__version__)
    if INTERPRETED and _MISSING is None
    else None
)


def unsupported_reason(device: torch.device) -> str | None:
    """Why the kernels cannot run on ``device``, in words for the user; None when they can."""
    if _MISSING is not None:
        return _MISSING
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "this torch is built for ROCm; the kernels are for NVIDIA GPUs"
        major, minor = _capability(device)
        if major < 8:
            return f"this GPU is sm_{major}{minor}; the kernels need sm_80 or newer"
        return None
    if device.type in ("cpu", "meta") and INTERPRETED:
        return _INTERPRETER
    return f"the tensors are on {device}; these kernels are for NVIDIA GPUs"


@constant_in_trace
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
