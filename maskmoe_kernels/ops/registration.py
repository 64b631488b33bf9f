"""Registered ops: schemas, implementations, fakes and FLOP formulas.

``masked_linear`` takes the kernels of the tensors' device where there are any: the C++ extension
registers its own for the CPU, which refuse what they cannot run, and on CUDA it is
``triton_linear``. Elsewhere it is ``grouped_linear``, the PyTorch fallback. Both can also be called
by name.

``layout`` is the layout's id; ``plan`` describes it fully, so that an exported program works in
a process that never built the layout. ``saved`` is the pre-activation for activations whose
derivative needs it, otherwise the output.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from maskmoe_kernels.backends import grouped, triton
from maskmoe_kernels.backends.activations import NEEDS_INPUT
from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.plan import layout_of
from maskmoe_kernels.ops.checks import check_count, check_like, check_linear

_LIBRARY = torch.library.Library("maskmoe", "DEF")
_FORWARD = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor plan, int layout, SymInt out_features, "
    "str activation, bool keep) -> (Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor grad_y, Tensor x, Tensor weight, Tensor saved, Tensor plan, int layout, "
    "str activation, bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)"
)
OPS = ("masked_linear", "grouped_linear", "triton_linear")
for _name in OPS:
    _LIBRARY.define(_name + _FORWARD, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.define(_name + "_backward" + _BACKWARD, tags=(torch.Tag.pt2_compliant_tag,))

# The C++ kernels call it before they plan the execution of a layout that they have not met. It
# returns the error: the dispatcher would lose the message of an exception.
_LIBRARY.define("check_serialized_layout(Tensor plan, int layout) -> str")


def _check_serialized_layout(plan: Tensor, layout: int) -> str:
    try:
        layout_of(layout, plan)
    except LayoutError as error:
        return str(error)
    return ""


class _Implementation:
    """The op and its backward on one way to compute them: ``of(x)`` gives its two functions."""

    def __init__(self, of: Callable[[Tensor], Any]) -> None:
        self._of = of

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        plan: Tensor,
        layout: int,
        out_features: int,
        activation: str,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        # A loaded program calls the op as such, with weights that may still require a gradient.
        of = layout_of(layout, plan)
        check_linear(x, weight, bias, of)
        check_count("out_features", out_features, of.out_features)
        with torch.no_grad():
            y, z = self._of(x).forward(x, weight, bias, of, activation, keep)
        return y, z

    def backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        weight: Tensor,
        saved: Tensor,
        plan: Tensor,
        layout: int,
        activation: str,
        need_x: bool,
        need_weight: bool,
        need_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs = (need_x, need_weight, need_bias)
        of = layout_of(layout, plan)
        check_linear(x, weight, None, of)
        check_like("grad_y", grad_y, x, of.out_features)
        if activation != "none":
            check_like("saved", saved, x, of.out_features)
        grads: tuple[Tensor, Tensor, Tensor] = self._of(x).backward(
            grad_y, x, weight, saved, of, activation, needs
        )
        return grads


def _triton(x: Tensor) -> Any:
    return grouped if triton.obstacle(x.device) else triton_kernels()


@cache
def triton_kernels() -> Any:
    """The Triton backend, which can run.

    Importing Triton costs as much as importing torch does: on the first call, not before.
    """
    return importlib.import_module("maskmoe_kernels.backends.triton.launch")


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: Tensor,
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
    plan: Tensor,
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


def _forward_flops(
    x: Tensor, weight: Tensor, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    return 2 * _rows(x) * weight.numel()  # present blocks, never the dense size


def _backward_flops(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    saved: Tensor,
    plan: Tensor,
    layout: int,
    activation: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    *args: Any,
    out_val: Any = None,
    **kwargs: Any,
) -> int:
    routed = layout_of(layout, plan).num_routed_weights if need_x else 0
    return 2 * _rows(x) * (routed + need_weight * weight.numel())


def _rows(x: Tensor) -> int:
    return math.prod(map(int, x.shape[:-1]))


_GROUPED = _Implementation(lambda x: grouped)
_TRITON = _Implementation(_triton)

_LIBRARY.impl("check_serialized_layout", _check_serialized_layout, "CompositeExplicitAutograd")
for _name in OPS:
    _way = _TRITON if _name == "triton_linear" else _GROUPED
    _LIBRARY.impl(_name, _way.forward, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name + "_backward", _way.backward, "CompositeExplicitAutograd")
    torch.library.register_fake("maskmoe::" + _name, _forward_fake, lib=_LIBRARY)
    torch.library.register_fake(f"maskmoe::{_name}_backward", _backward_fake, lib=_LIBRARY)
    _flops = register_flop_formula(getattr(torch.ops.maskmoe, _name), get_raw=True)
    _flops(_forward_flops)
    _flops = register_flop_formula(getattr(torch.ops.maskmoe, _name + "_backward"), get_raw=True)
    _flops(_backward_flops)
_LIBRARY.impl("masked_linear", _TRITON.forward, "CUDA")
_LIBRARY.impl("masked_linear_backward", _TRITON.backward, "CUDA")
