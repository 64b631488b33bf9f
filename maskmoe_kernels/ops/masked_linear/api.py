"""The functional front end: checks, autocast, transforms, then one op."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from maskmoe_kernels._compat import any_autocast, constant_in_trace, forward_mode, func_transforms
from maskmoe_kernels.errors import BackendError
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.serialized import plan_of
from maskmoe_kernels.ops.activations import activation_name
from maskmoe_kernels.ops.checks import PLAIN, check_linear, refuse_sharded
from maskmoe_kernels.ops.dispatch import choose, warn_of_fallback
from maskmoe_kernels.ops.masked_linear import reference
from maskmoe_kernels.ops.masked_linear.autograd import (
    APPLY,
    FORWARD,
    MaskedLinearFunction,
)
from maskmoe_kernels.ops.masked_linear.direct import DIRECT, unwatched
from maskmoe_kernels.ops.masked_linear.schema import triton_kernels

# The op behind a backend; the reference is none. ``masked_linear`` takes a device's own kernels.
OP_OF = {"native": "masked_linear", "triton": "masked_linear", "torch": "torch_linear"}


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: BlockLayout,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Linear map over the present blocks, with routed gradients (eq. 14, section 3.4.2).

    Computes ``act(W x + b)``. Features that a unit may not see are never multiplied, so no
    value in them, NaN and Inf included, reaches it. The gradient to ``x`` walks
    ``layout.routes_grad`` only; the gradient to ``weight`` every present block.

    Args:
        x: Activations, ``(*, in_features)``.
        weight: Packed blocks, ``(layout.num_weights,)``; see ``layout.pack``.
        bias: ``(out_features,)`` or ``None``.
        layout: Which blocks exist and which route a gradient.
        activation: ``None``, ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"gelu"``, ``"tanh"``
            or ``"silu"``.
        backend: ``None`` chooses the fastest; ``"reference"`` supports double backward.

    Returns:
        ``(*, out_features)``, in the dtype of ``x`` (under autocast, in its dtype).

    Raises:
        LayoutError: A shape, dtype or device that does not fit, or an unknown activation.
        BackendError: The named backend cannot run, forward-mode AD was asked for, or the
            parameters are DTensors.
    """
    name = "none" if activation is None else activation_name(activation)
    if any_autocast():
        x, weight, bias = autocast(x.device.type, (x, weight, bias))
    if type(weight) not in PLAIN or type(bias) not in PLAIN:
        refuse_sharded(x, weight, bias)
    check_linear(x, weight, bias, layout)
    compiling = torch.compiler.is_compiling()
    route = None if compiling else layout.routes.get((backend, x.dtype, x.device))
    op, plan, kernels = route or _route(backend, x, layout, keep=not compiling)
    if forward_mode():
        _refuse_forward_ad(x, weight, bias)
    if func_transforms():
        _refuse_transform(backend)
        if backend is None:
            _warn_of_transform()
        op = None
    if op is None:
        return reference.masked_linear(x, weight, bias, layout, name)
    graph = torch.is_grad_enabled() and (
        weight.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)
    )
    if kernels is not None and unwatched(x, weight, bias):
        registered = layout._registered or layout
        direct: Tensor = (
            DIRECT(x, weight, bias, (kernels, registered, name, op, plan))
            if graph
            else kernels.output(x, weight, bias, registered, name, False)[0]
        )
        return direct
    if graph:
        apply: Any = MaskedLinearFunction.apply if compiling else APPLY
        y: Tensor = apply(x, weight, bias, (plan, layout.id, layout.out_features, name, op))
        return y
    result: Tensor = FORWARD[op](
        x, weight, bias, plan, layout.id, layout.out_features, name, False
    )[0]
    return result


def _route(
    backend: str | None, x: Tensor, layout: BlockLayout, keep: bool
) -> tuple[str | None, Tensor, Any]:
    """The op, the plan, and kernels that may also be called as such.

    The choice is the same for every call on a layout with these three; small layers feel what it
    costs.
    """
    name = choose("masked_linear", backend, layout, (x,))
    op = OP_OF.get(name)
    if name == "triton" and not x.is_cuda:  # the interpreter
        op = "triton_linear"
    direct = keep and name == "triton"
    route = op, plan_of(layout, x.device), triton_kernels() if direct else None
    if keep:
        if backend is None:
            warn_of_fallback(name, layout, x)
        layout.routes[backend, x.dtype, x.device] = route
    return route


def _refuse_transform(backend: str | None) -> None:
    if backend not in (None, "reference"):
        raise BackendError(
            f"backend {backend!r} does not support torch.func transforms; use "
            "backend='reference' or leave the choice open with backend=None"
        )


@constant_in_trace
def _warn_of_transform() -> None:
    warnings.warn(
        "torch.func transforms run masked_linear on the reference backend, which is slow; "
        "pass backend='reference' to say that you know",
        stacklevel=3,
    )


def autocast(device: str, tensors: Iterable[Tensor | None]) -> list[Any]:
    """What torch's own linear does: every floating input but float64 goes to the autocast dtype."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return [*tensors]
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    return [None if t is None else cast(t) for t in tensors]


def _refuse_forward_ad(*inputs: Tensor | None) -> None:
    # Silence would be worse than an error: an op without a rule gives a zero tangent.
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in inputs):
        raise BackendError(
            "masked_linear has no forward-mode derivative: its gradient is routed, so it is not "
            "the derivative of the forward; use reverse mode (backward, torch.func.grad or vjp)"
        )
