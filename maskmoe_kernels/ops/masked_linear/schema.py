"""Registered ops: schemas, implementations, fakes and FLOP formulas.

A forward and a backward op each: ``masked_linear`` is what :mod:`ops.dispatch` chooses for the
device, ``torch_linear`` and ``triton_linear`` are one implementation each. The C++ extension
registers ``masked_linear`` for the CPU. All can be called by name.

``layout`` is the layout's id; ``serialized`` describes it fully, so that an exported program works
in a process that never built the layout. ``saved`` is the pre-activation for activations whose
derivative needs it, otherwise the output.
"""

from __future__ import annotations

import importlib
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from maskmoe_kernels._compat import register_flops
from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.serialized import layout_of
from maskmoe_kernels.ops.activations import NEEDS_INPUT
from maskmoe_kernels.ops.checks import check_count, check_like, check_linear
from maskmoe_kernels.ops.dispatch import choose
from maskmoe_kernels.ops.masked_linear import torch_impl

_LIBRARY = torch.library.Library("maskmoe", "DEF")
# The id is a SymInt: the code that torch.compile traces is the same for every layout.
_FORWARD = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor serialized, SymInt layout, "
    "SymInt out_features, str activation, bool keep) -> (Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor grad_y, Tensor x, Tensor weight, Tensor saved, Tensor serialized, SymInt layout, "
    "str activation, bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)"
)
#: Op to the backend that it is; ``None``: what dispatch chooses for the device.
OPS: dict[str, str | None] = {
    "masked_linear": None,
    "torch_linear": "torch",
    "triton_linear": "triton",
}

# --- Implementations -----------------------------------------------------------------------------


class _Implementation:
    """An op and its backward, by the functions of a module: ``torch_impl`` or Triton's."""

    def __init__(self, backend: str | None) -> None:
        self._backend, self._name = backend, f"op {backend}"

    def _module(self, layout: BlockLayout, x: Tensor) -> Any:
        kept, key = layout.caches.dispatch, (self._name, x.dtype, x.device)
        module = kept.get(key)
        if module is None:
            name = choose("masked_linear", self._backend, layout, (x,))
            module = kept[key] = triton_kernels() if name == "triton" else torch_impl
        return module

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        serialized: Tensor,
        layout: int,
        out_features: int,
        activation: str,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        # A loaded program calls the op as such, with weights that may still require a gradient.
        of = layout_of(layout, serialized)
        check_linear(x, weight, bias, of)
        check_count("out_features", out_features, of.out_features)
        with torch.no_grad():
            y, z = self._module(of, x).forward(x, weight, bias, of, activation, keep)
        return y, z

    def backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        weight: Tensor,
        saved: Tensor,
        serialized: Tensor,
        layout: int,
        activation: str,
        *needs: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        of = layout_of(layout, serialized)
        check_linear(x, weight, None, of)
        check_like("grad_y", grad_y, x, of.out_features)
        if activation != "none":
            check_like("saved", saved, x, of.out_features)
        grads: tuple[Tensor, Tensor, Tensor] = self._module(of, x).backward(
            grad_y, x, weight, saved, of, activation, needs
        )
        return grads


@cache
def triton_kernels() -> Any:
    """The module of Triton's launches, where they can run.

    Importing Triton takes as long as importing torch: the first call does it.
    """
    return importlib.import_module("maskmoe_kernels.ops.masked_linear.triton.launch")


def _check_serialized_layout(serialized: Tensor, layout: int) -> str:
    try:
        layout_of(layout, serialized)
    except LayoutError as error:
        return str(error)
    return ""


# --- Fakes ---------------------------------------------------------------------------------------


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    serialized: Tensor,
    layout: int,
    out_features: int,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape[:-1], out_features)
    return y, torch.empty_like(y) if keep and activation in NEEDS_INPUT else x.new_empty(0)


def _backward_fake(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    saved: Tensor,
    serialized: Tensor,
    layout: int,
    activation: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else 0),
        x.new_empty(weight.shape if need_weight else 0),
        x.new_empty(grad_y.shape[-1:] if need_bias else 0),
    )


# --- FLOPs ---------------------------------------------------------------------------------------


def _forward_flops(
    x: Tensor, weight: Tensor, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    return 2 * _rows(x) * weight.numel()  # present blocks, never the dense size


def _backward_flops(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    saved: Tensor,
    serialized: Tensor,
    layout: int,
    activation: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    *args: Any,
    out_val: Any = None,
    **kwargs: Any,
) -> int:
    routed = layout_of(layout, serialized).num_routed_weights if need_x else 0
    return 2 * _rows(x) * (routed + need_weight * weight.numel())


def _rows(x: Tensor) -> int:
    return math.prod(map(int, x.shape[:-1]))


# --- Registration --------------------------------------------------------------------------------

for _name, _backend in OPS.items():
    _of = _Implementation(_backend)
    for _op, _schema, _run, _fake, _flops in (
        (_name, _FORWARD, _of.forward, _forward_fake, _forward_flops),
        (_name + "_backward", _BACKWARD, _of.backward, _backward_fake, _backward_flops),
    ):
        _LIBRARY.define(_op + _schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(_op, _run, "CompositeExplicitAutograd")
        torch.library.register_fake("maskmoe::" + _op, _fake, lib=_LIBRARY)
        register_flops(getattr(torch.ops.maskmoe, _op), _flops, raw=True)

# The C++ kernels call it before they plan the execution of a layout that they have not met. It
# returns the error: the dispatcher would lose the message of an exception.
_LIBRARY.define("check_serialized_layout(Tensor serialized, int layout) -> str")
_LIBRARY.impl("check_serialized_layout", _check_serialized_layout, "CompositeExplicitAutograd")

#: Op by name: looking one up in torch.ops takes as long as a small layer.
FORWARD = {name: getattr(torch.ops.maskmoe, name).default for name in OPS}
BACKWARD = {name: getattr(torch.ops.maskmoe, name + "_backward").default for name in OPS}
