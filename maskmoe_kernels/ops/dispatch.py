"""Which implementation of an op runs, and why another one cannot.

Nothing else in the package decides this. An op is ``"masked_linear"``, ``"masked_mlp"`` (a whole
network) or ``"selection"`` (selection, mixture and loss). Its ``layout`` is a :class:`BlockLayout`;
a :class:`LayoutChain`, or any sequence of layouts; or a :class:`SubsetFamily`. Of the ``tensors``
that it is called with, the first one decides dtype and device. Without a layout (``None``), the
answer is for one that every implementation takes.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from maskmoe_kernels._compat import constant_in_trace, outside_of_modes, transformed
from maskmoe_kernels.errors import BackendError
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.chain import LayoutChain
from maskmoe_kernels.layout.serialized import serialized_layout
from maskmoe_kernels.layout.subsets import SubsetFamily
from maskmoe_kernels.ops import native, triton_support
from maskmoe_kernels.ops.triton_support.limits import CONFIDENCES, DTYPES, MAX_EXPERTS

#: Fastest first; ``backend=None`` takes the first that can run.
BACKENDS: tuple[str, ...] = ("triton", "native", "torch", "reference")

DESCRIPTIONS: dict[str, str] = {
    "triton": "Triton kernels for NVIDIA GPUs",
    "native": "C++ kernels for the CPU; CUDA C++ kernels for whole networks",
    "torch": "PyTorch, one matrix product per run of present blocks",
    "reference": "plain differentiable PyTorch: slow, for double backward and torch.func",
}

#: Devices whose tensors go to Triton unasked. Its interpreter on the CPU is for tests: there
#: ``masked_linear`` runs in it where it is named, and tests of ``selection`` add the CPU here.
TRITON_DEVICES = {"cuda"}


@dataclass(frozen=True)
class LayoutHandle:
    """What code that torch.compile traces reads of a layout: tensors, and nothing else.

    A trace guards each Python number that it reads. This holds none that differs from layout to
    layout, so that one graph serves all of them; a tensor's sizes become dynamic by themselves.

    Attributes:
        serialized: See :func:`serialized_layout`.
        numbers: No values, shape ``(0, id, out_features)``, strides 0.
        unfit: The implementations of ``masked_linear`` that do not take the layout.
    """

    serialized: Tensor
    numbers: Tensor
    unfit: tuple[str, ...]

    @classmethod
    def of(cls, layout: BlockLayout, device: torch.device) -> LayoutHandle:
        """The handle of ``layout`` on ``device``; make it before the trace."""
        with outside_of_modes():
            shape = (0, layout.id, layout.out_features)
            numbers = torch.empty_strided(shape, (0, 0, 0), dtype=torch.uint8, device=device)
        like = torch.empty(0, device=device)
        unfit = [
            name
            for name in ("triton", "native")
            if _linear_reason(name, None, like) is None
            and _linear_reason(name, layout, like) is not None
        ]
        return cls(serialized_layout(layout, device), numbers, tuple(unfit))

    def __deepcopy__(self, memo: dict[int, Any]) -> LayoutHandle:
        return self  # immutable; and a serialized layout is known by its identity


Layout = BlockLayout | LayoutHandle | None
Layouts = Layout | LayoutChain | Sequence[BlockLayout] | SubsetFamily

TOO_FINE = (
    "its layout has too many blocks of too few weights, more than 65,536 of less than 16 on "
    "average: tables of them would be larger than the weights"
)
_NO_TILES = (
    "its layout does not fit tiles: they would multiply more than twice what a dense product does"
)
_FLOAT32 = (
    "its CUDA kernels are not chosen by themselves in float32: they take three TF32 products for "
    "one, whose error is a few times that of float32; name them with backend='native'"
)

# Larger networks have been slower in one pass than layer by layer (docs/benchmarks.md).
_MOST_GPU_WEIGHTS = 200_000


def unsupported_reason(
    op: str,
    implementation: str,
    layout: Layouts,
    tensors: Sequence[Tensor],
    confidence: object = "abs",
) -> str | None:
    """Why ``implementation`` of ``op`` cannot run, in words for the user; None if it can.

    Args:
        op: One of the three of this module.
        implementation: A name of ``BACKENDS``. A network runs as one op with ``"native"``, and
            layer by layer with the others.
        layout: What the op is called with.
        tensors: What the op is called with; the first one decides.
        confidence: Of ``selection``, a name or a function.
    """
    x = tensors[0]
    if not x.is_floating_point():
        return f"x is {x.dtype}; convert it to a floating-point type first"
    if op == "selection":
        return _selection_reason(implementation, layout, x, confidence)
    if op == "masked_mlp" and implementation == "native":
        return _fused_mlp_reason(layout, x)
    layouts = _layouts_of(layout)
    return next(filter(None, (_linear_reason(implementation, of, x) for of in layouts)), None)


def reason_against(
    op: str,
    implementation: str,
    backend: str | None,
    layout: Layouts,
    tensors: Sequence[Tensor],
    confidence: object = "abs",
) -> str | None:
    """Why a call with ``backend`` does not run ``implementation``; None if it may.

    Beside what cannot run, that is what was not asked for (another backend is named), and with
    ``backend=None`` what nobody should get unasked.
    """
    if backend is not None and backend != implementation:
        return f"backend {backend!r} was asked for"
    device = tensors[0].device.type
    if backend is None and implementation == "triton" and device not in TRITON_DEVICES:
        return f"the tensors are on {device}; these kernels are for NVIDIA GPUs"
    reason = unsupported_reason(op, implementation, layout, tensors, confidence)
    if reason is None and backend is None and op == "masked_mlp" and implementation == "native":
        return _gpu_reason(layout, tensors[0]) if device == "cuda" else None
    return reason


def computed_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that a call with ``weight`` computes in: on a GPU, autocast's for float32."""
    if weight.dtype == torch.float32 and weight.is_cuda and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return weight.dtype


def note_gpu_bytes(chain: LayoutChain) -> None:
    """Find out what ``chain`` takes on a GPU, before a trace asks: a trace cannot."""
    if chain.gpu_bytes is None:
        with outside_of_modes():
            chain.gpu_bytes = native.mlp_bytes(chain)


def choose(
    op: str,
    backend: str | None,
    layout: Layouts,
    tensors: Sequence[Tensor],
    confidence: object = "abs",
) -> str:
    """The implementation to run: the named one, or with ``backend=None`` the fastest that can.

    Raises:
        BackendError: An unknown name, or a named backend that cannot run.
    """
    check_backend(backend)
    if backend is not None:
        reason = unsupported_reason(op, backend, layout, tensors, confidence)
        if reason is not None:
            raise BackendError(f"backend {backend!r} cannot run: {reason}")
        return backend
    # A network that runs as one op beats any that runs layer by layer.
    order = ("native", "triton", "torch") if op == "masked_mlp" else BACKENDS
    for name in order:
        reason = reason_against(op, name, None, layout, tensors, confidence)
        if reason is None:
            return name
    raise BackendError(f"no backend can run: {reason}")


def check_backend(backend: str | None) -> None:
    """Raise BackendError unless ``backend`` is None or a name that exists."""
    if backend is not None and (not isinstance(backend, str) or backend not in BACKENDS):
        raise BackendError(f"backend must be None or one of {list(BACKENDS)}, got {backend!r}")


# --- Reasons, one function an op -----------------------------------------------------------------


def _linear_reason(implementation: str, layout: Layout, x: Tensor) -> str | None:
    if implementation == "triton":
        reason = _dtype_reason(x) or _triton_reason(x.device)
        return reason or (None if _tiles_fit(layout) else _NO_TILES)
    if implementation == "native":
        if x.device.type == "cuda":
            return (
                f"x is on {x.device}; single layers have C++ kernels for the CPU only (whole "
                "networks have CUDA kernels too). backend='triton' is for NVIDIA GPUs"
            )
        if x.device.type not in ("cpu", "meta"):
            return f"x is on {x.device}; these kernels are for the CPU"
        return _dtype_reason(x) or native.UNSUPPORTED_REASON or _fine_reason(layout)
    return None


def _fused_mlp_reason(layout: Layouts, weight: Tensor) -> str | None:
    if isinstance(layout, LayoutChain):  # which has looked at its layouts once
        mismatch, too_fine = layout.mismatch, layout.too_fine
    else:
        mismatch, too_fine = None, any(map(_fine_reason, _layouts_of(layout)))
    if mismatch is not None:
        return mismatch
    reason = _dtype_reason(weight, "the weights are")
    if reason is not None:
        return reason
    if weight.device.type == "cuda":
        return native.CUDA_UNSUPPORTED_REASON
    if weight.device.type != "cpu":
        return (
            f"the weights are on {weight.device}; whole networks run as one op on the CPU and on "
            "NVIDIA GPUs"
        )
    return native.UNSUPPORTED_REASON or (TOO_FINE if too_fine else None)


def _gpu_reason(layout: Layouts, weight: Tensor) -> str | None:
    """Why a network does not get its CUDA kernels unasked."""
    if computed_dtype(weight) == torch.float32:
        return _FLOAT32
    if not isinstance(layout, LayoutChain) or layout.gpu_bytes is None:
        return "it is not known yet what it takes on a GPU"
    needed = layout.gpu_bytes
    if isinstance(needed, str):
        return needed
    limit = _shared_memory(weight.device)
    if needed[0] > limit:
        return (
            f"its CUDA kernels take {needed[0]} bytes of shared memory in training, and this GPU "
            f"has {limit} a block"
        )
    if layout.num_weights > _MOST_GPU_WEIGHTS:
        return (
            f"it has {layout.num_weights} weights, and its CUDA kernels are faster than its layers "
            f"up to about {_MOST_GPU_WEIGHTS}; name them with backend='native'"
        )
    return None


def _selection_reason(
    implementation: str, family: Layouts, logits: Tensor, confidence: object
) -> str | None:
    if implementation == "native":
        return "selection has no kernels of its own in C++; a whole network's are in its op"
    if implementation != "triton":
        return None
    experts = family.num_experts if isinstance(family, SubsetFamily) else logits.shape[-1]
    if logits.device.type not in TRITON_DEVICES:
        return f"the logits are on {logits.device}; these kernels are for NVIDIA GPUs"
    if experts > MAX_EXPERTS:
        return f"there are {experts} experts; these kernels hold up to {MAX_EXPERTS}"
    if not isinstance(confidence, str) or confidence not in CONFIDENCES:
        return "the confidence is a function; these kernels know those that have a name"
    if transformed():
        return "torch.func transforms and forward-mode AD go through PyTorch"
    return _dtype_reason(logits, "the logits are") or _triton_reason(logits.device)


def _layouts_of(layout: Layouts) -> Sequence[Layout]:
    if layout is None or isinstance(layout, (BlockLayout, LayoutHandle)):
        return (layout,)
    if isinstance(layout, SubsetFamily):
        raise TypeError("a family is the layout of selection only")
    return layout.layouts if isinstance(layout, LayoutChain) else layout


def _dtype_reason(x: Tensor, named: str = "x is") -> str | None:
    if x.dtype not in DTYPES:
        return f"{named} {x.dtype}; these kernels compute in float32, bfloat16 and float16"
    return None


def _fine_reason(layout: Layout) -> str | None:
    if isinstance(layout, LayoutHandle):
        return TOO_FINE if "native" in layout.unfit else None
    return TOO_FINE if layout is not None and layout.too_fine else None


@constant_in_trace
def _triton_reason(device: torch.device) -> str | None:
    return triton_support.unsupported_reason(device)


@constant_in_trace
def _shared_memory(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    bytes_a_block: int = properties.shared_memory_per_block_optin
    return bytes_a_block


def _tiles_fit(layout: Layout) -> bool:
    if isinstance(layout, LayoutHandle):
        return "triton" not in layout.unfit
    return layout is None or _tiles_of_layout_fit(layout)


@constant_in_trace
def _tiles_of_layout_fit(layout: BlockLayout) -> bool:
    # Imported where it can run only: importing Triton takes as long as importing torch.
    products = importlib.import_module("maskmoe_kernels.ops.masked_linear.triton.products")
    with outside_of_modes():
        fits: bool = products.products_of(layout).fits
    return fits


# --- What the user is told -----------------------------------------------------------------------


def warn_of_fallback(name: str, layout: BlockLayout, x: Tensor) -> None:
    """Warn once if ``x`` takes the PyTorch path where its device could have kernels."""
    if name == "torch" and _dtype_reason(x) is None and x.device.type in ("cpu", "cuda"):
        best = "triton" if x.is_cuda else "native"
        reason = unsupported_reason("masked_linear", best, layout, (x,))
        _warn_once(f"masked_linear runs in plain PyTorch: no {best} kernels, {reason}")


@cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=5)


class Info(dict[str, Any]):
    """Facts by name; printed, a line each. A reason why something cannot run prints as such."""

    def __repr__(self) -> str:
        return "\n".join(_lines(self))


def yes_or_why_not(reason: str | None) -> str:
    """What :func:`info` says of something that can run, or cannot for a reason, in words."""
    return "yes" if reason is None else f"no: {reason}"


def _lines(facts: dict[str, Any], indent: str = "") -> Iterator[str]:
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        if isinstance(value, dict) and "unsupported_reason" in value:
            can = yes_or_why_not(value["unsupported_reason"])
            yield f"{indent}{name:<{width}}  {can} ({value['description']})"
        elif isinstance(value, dict) and value:
            yield f"{indent}{name}"
            if name == "build":  # of these two it holds why they were not built
                value = value | {part: yes_or_why_not(value[part]) for part in ("cpu", "cuda")}
            yield from _lines(value, indent + "  ")
        else:
            shown = ", ".join(value) if isinstance(value, list) else value
            yield f"{indent}{name:<{width}}  {'none' if shown in (None, {}, '') else shown}"


def info() -> Info:
    """Versions, and every backend with what it is and why it cannot run here (None: it can).

    A dictionary, which prints as text.
    """
    cuda = torch.cuda.is_available()
    probes = {"triton": torch.empty(0, device="cuda" if cuda else "cpu")}

    def reason(name: str) -> str | None:
        like = probes.get(name, torch.empty(0))
        return unsupported_reason("masked_linear", name, None, (like,))

    return Info({
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton")
        if importlib.util.find_spec("triton")
        else None,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "isa": {"used": native.isa(), "available": native.isas()},
        "build": native.build_record(),
        "cuda": torch.cuda.get_device_name() if cuda else None,
        "masked_mlp": {
            "cpu": {
                "description": "whole networks as one op, in C++",
                "unsupported_reason": native.UNSUPPORTED_REASON,
            },
            "cuda": {
                "description": "whole networks as one op, in CUDA C++",
                "unsupported_reason": native.CUDA_UNSUPPORTED_REASON,
            },
        },
        "backends": {
            name: {"description": DESCRIPTIONS[name], "unsupported_reason": reason(name)}
            for name in BACKENDS
        },
    })  # fmt: skip
