"""The C++ kernels: whether they are here, which instruction set they use, and why not.

Importing the extension registers the ops. What else it has: launches of Triton's kernels, and what
a network takes on a GPU.
``MASKMOE_ISA`` names the instruction set to use (``amx``, ``avx512``, ``avx2``),
``MASKMOE_EXTENSION`` a different build of the extension to load (with sanitizers, say).
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from maskmoe_kernels.errors import BackendError
from maskmoe_kernels.layout.chain import LayoutChain
from maskmoe_kernels.layout.serialized import on_forget

_PACKAGE = Path(__file__).parent.parent


def extension() -> ModuleType | None:
    """The C++ extension; None where it is not there."""
    return _extension


def isas() -> list[str]:
    """Instruction sets that this build has kernels for and this machine runs, widest first."""
    return [] if _extension is None else list(_extension.isas())


def isa() -> str | None:
    """The instruction set in use; None without kernels."""
    return None if _extension is None else _extension.isa()


def set_isa(name: str) -> None:
    """Compute with the kernels for ``name`` from now on, in all threads.

    Raises:
        BackendError: No such kernels here.
    """
    if _extension is None or not _extension.set_isa(name):
        raise BackendError(f"no kernels for {name!r} here; there are {isas() or 'none'}")


def mlp_bytes(chain: LayoutChain) -> tuple[int, int] | str:
    """Bytes of shared memory that training takes on a GPU, with 2 and with 4 bytes a number.

    A text says why the CUDA kernels do not compute such a network.
    """
    if CUDA_UNSUPPORTED_REASON is not None or _extension is None:
        return CUDA_UNSUPPORTED_REASON or _reason
    serialized, _ = chain.serialized(torch.device("cpu"))
    layouts = [layout.numpy().tobytes() for layout in serialized]
    found: tuple[int, int] | str = _extension.mlp_bytes(layouts, chain.in_features)
    return found.removeprefix("maskmoe: ") if isinstance(found, str) else found


def build_record() -> dict[str, Any]:
    """What setup.py wrote about the build; empty if it was never run."""
    try:
        record: dict[str, Any] = json.loads((_PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return record


def _load() -> tuple[ModuleType | None, str]:
    other = os.environ.get("MASKMOE_EXTENSION")
    try:
        if not other:
            return importlib.import_module("maskmoe_kernels._C"), ""
        loader = importlib.machinery.ExtensionFileLoader("maskmoe_kernels._C", other)
        spec = importlib.util.spec_from_file_location("maskmoe_kernels._C", other, loader=loader)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        loader.exec_module(module)
        return module, ""
    except ImportError as error:
        if other or not isinstance(error, ModuleNotFoundError):
            return None, f"the extension does not load: {error}"
        why = build_record().get("cpu") or "it was never built; run `make build` or `pip install .`"
        return None, f"the C++ extension is not there: {why}"


_extension, _reason = _load()
#: Why the kernels cannot run on this machine at all; None when they can. (A constant: torch.compile
#: reads it while it traces.)
UNSUPPORTED_REASON: str | None = _reason or (
    None if isas() else "there are no kernels for this processor (they need AVX2 or AVX-512)"
)
#: Why there are no C++ kernels for NVIDIA GPUs; None when there are.
CUDA_UNSUPPORTED_REASON: str | None = _reason or (
    f"the extension was built without CUDA kernels: {build_record()['cuda']}"
    if build_record().get("cuda")
    else None
)
if _extension is not None:
    on_forget(_extension.forget)
if _extension is not None and os.environ.get("MASKMOE_ISA"):
    set_isa(os.environ["MASKMOE_ISA"])
