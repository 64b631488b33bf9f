"""Every way to run the op on the device under test: each backend, and the C++ kernels for each
instruction set. Triton's kernels run in its interpreter where there is no GPU."""

import os

import torch

import maskmoe_kernels as mk
from maskmoe_kernels.ops import native
from maskmoe_kernels.ops import triton_support as triton
from maskmoe_kernels.ops.dispatch import BACKENDS, unsupported_reason

DEVICE = torch.device(os.environ.get("MASKMOE_TEST_DEVICE", "cpu"))
#: How the names of instruction sets begin that multiply bfloat16, to which denormals are zeros.
OF_BFLOAT16 = ("amx", "avx512bf16")
#: What float32 on the CPU may name. Triton's interpreter is not there where a GPU is.
ON_CPU = [
    name
    for name in BACKENDS
    if unsupported_reason("masked_linear", name, None, (torch.empty(0, device="cpu"),)) is None
]
#: The interpreter takes a second where the others take a millisecond, and knows no bfloat16.
INTERPRETED = (
    ["triton"] if DEVICE.type == "cpu" and triton.unsupported_reason(DEVICE) is None else []
)
QUICK = [
    *(["triton"] if DEVICE.type == "cuda" else [f"native {isa}" for isa in native.isas()]),
    *(name for name in BACKENDS if name not in ("native", "triton")),
]
RUNNERS = (*QUICK, *INTERPRETED)
#: For hypothesis to sample from: one example in ten or so for the interpreter.
DRAWN = (*QUICK * 3, *INTERPRETED)


def select(runner, dtype=torch.float32):
    """The backend of ``runner``, whose instruction set is used from now on.

    Kernels leave float64 to PyTorch, so there the choice is left open.
    """
    backend, _, isa = runner.partition(" ")
    if isa:
        native.set_isa(isa)
    return None if backend in ("native", "triton") and dtype == torch.float64 else backend


def masked_linear(x, weight, bias, layout, activation=None, runner=None):
    """``mk.masked_linear`` on one runner; layouts that Triton's tiles do not fit go to PyTorch."""
    backend = select(runner, x.dtype)
    if backend == "triton" and unsupported_reason("masked_linear", backend, layout, (x,)):
        backend = "torch"
    return mk.masked_linear(x, weight, bias, layout, activation, backend)
