"""The functional front end: checks, autocast, transforms, then one op."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.autograd import forward_ad

from maskmoe_kernels.backends import reference
from maskmoe_kernels.backends.activations import activation_name
from maskmoe_kernels.backends.choice import choose
from maskmoe_kernels.errors import BackendError, LayoutError
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.plan import plan_of
from maskmoe_kernels.ops.autograd import FORWARD, MaskedLinearFunction


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
        BackendError: The named backend cannot run, or forward-mode AD was asked for.
    """
    name = activation_name(activation)
    x, weight, bias = _autocast(x, weight, bias)
    _check(x, weight, bias, layout)
    chosen = choose(backend, x)
    if not torch.compiler.is_compiling():
        _refuse_forward_ad(x, weight, bias)
        if torch._C._are_functorch_transforms_active():
            if backend not in (None, "reference"):
                raise BackendError(
                    f"backend {backend!r} does not support torch.func transforms; use "
                    "backend='reference' or leave the choice open with backend=None"
                )
            if backend is None:
                warnings.warn(
                    "torch.func transforms run masked_linear on the reference backend, which is "
                    "slow; pass backend='reference' to say that you know",
                    stacklevel=2,
                )
            chosen = "reference"
    if chosen == "reference":
        return reference.masked_linear(x, weight, bias, layout, name)
    plan = plan_of(layout, x.device)
    op = "grouped_linear" if chosen == "grouped" else "masked_linear"
    needs_grad = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if needs_grad:
        y: Tensor = MaskedLinearFunction.apply(
            x, weight, bias, plan, layout.id, layout.out_features, name, op
        )  # type: ignore[no-untyped-call]
        return y
    result: Tensor = FORWARD[op](
        x, weight, bias, plan, layout.id, layout.out_features, name, False
    )[0]
    return result


def _autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    # What torch's own linear does: every floating input but float64 goes to the autocast dtype.
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    return cast(x), cast(weight), None if bias is None else cast(bias)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, layout: BlockLayout) -> None:
    if not x.is_floating_point():
        raise LayoutError(f"x must be floating-point, got {x.dtype}; convert it first")
    if x.dim() == 0 or x.shape[-1] != layout.in_features:
        raise LayoutError(
            f"x must be (*, in_features) with in_features={layout.in_features}, got "
            f"{tuple(x.shape)}"
        )
    if weight.dim() != 1 or weight.shape[0] != layout.num_weights:
        layout.check_weight(weight)
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != layout.out_features):
        raise LayoutError(
            f"bias must be (out_features,) = ({layout.out_features},), got {tuple(bias.shape)}"
        )
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and (other.dtype != x.dtype or other.device != x.device):
            raise LayoutError(
                f"x is {x.dtype} on {x.device} but {name} is {other.dtype} on {other.device}; "
                "move both to one dtype and device"
            )


def _refuse_forward_ad(*inputs: Tensor | None) -> None:
    # Silence would be worse than an error: an op without a rule gives a zero tangent.
    if forward_ad._current_level < 0:
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in inputs):
        raise BackendError(
            "masked_linear has no forward-mode derivative: its gradient is routed, so it is not "
            "the derivative of the forward; use reverse mode (backward, torch.func.grad or vjp)"
        )
