"""Every way to run the op here: each backend, and the C++ kernels for each instruction set."""

import torch

import maskmoe_kernels as mk
from maskmoe_kernels.backends import native
from maskmoe_kernels.backends.choice import BACKENDS

RUNNERS = (
    *(name for name in BACKENDS if name != "native"),
    *(f"native {isa}" for isa in native.isas()),
)


def select(runner, dtype=torch.float32):
    """The backend of ``runner``, whose instruction set is used from now on.

    The C++ kernels leave float64 to others, so there the choice is left open.
    """
    backend, _, isa = runner.partition(" ")
    if isa:
        native.set_isa(isa)
    return None if backend == "native" and dtype == torch.float64 else backend


def masked_linear(x, weight, bias, layout, activation=None, runner=None):
    """``mk.masked_linear`` on one runner."""
    return mk.masked_linear(x, weight, bias, layout, activation, select(runner, x.dtype))
