"""The routed gradient: one registered op forward, one backward."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from maskmoe_kernels.errors import BackendError
from maskmoe_kernels.ops.activations import NEEDS_INPUT
from maskmoe_kernels.ops.masked_linear.schema import OPS

# Attribute look-ups on torch.ops cost as much as small layers do.
FORWARD = {name: getattr(torch.ops.maskmoe, name).default for name in OPS}
BACKWARD = {name: getattr(torch.ops.maskmoe, name + "_backward").default for name in OPS}


class MaskedLinearFunction(torch.autograd.Function):
    """y = act(W x + b) over present blocks; grad_x walks routed blocks only (section 3.4.2).

    grad_x is not the derivative of the forward wherever a block is present but not routed: the
    stop-gradient is work not done.

    What has no gradient comes as one argument: small layers feel every one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        fixed: tuple[Tensor, int, int, str, str],
    ) -> Tensor:
        """Output ``(*, out_features)``; keeps x, the weight and what the derivative needs."""
        plan, layout, out_features, activation, op = fixed
        y: Tensor
        z: Tensor
        y, z = FORWARD[op](x, weight, bias, plan, layout, out_features, activation, True)
        saved = z if activation in NEEDS_INPUT or activation == "none" else y
        ctx.save_for_backward(x, weight, saved, bias)
        ctx.fixed = fixed
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """grad_x, grad_weight and grad_bias, each only where needed."""
        x, weight, saved, bias = ctx.saved_tensors
        plan, layout, _, activation, op = ctx.fixed
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with torch.no_grad() if graph else nullcontext():
            grad_x, grad_weight, grad_bias = BACKWARD[op](
                grad_y, x, weight, saved, plan, layout, activation, need_x, need_weight, need_bias
            )
        grads = (
            grad_x if need_x else None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
        )
        return (*(once(grads, grad_y, x, weight, bias) if graph else grads), None)


# Function.apply looks for torch.func's wrappers first, which small layers feel; the front end has
# sent those to another backend already. torch 2.11 traces the name ``apply`` alone.
APPLY: Any = super(torch.autograd.Function, MaskedLinearFunction).apply


_ONCE = "this backend cannot differentiate masked_linear twice; pass backend='reference', which can"


def once(grads: Iterable[Tensor | None], *depends_on: Tensor | None) -> tuple[Tensor | None, ...]:
    """``grads`` under create_graph=True: they depend on all of these, and have to say so."""
    return tuple(None if g is None else differentiable_once(g, _ONCE, *depends_on) for g in grads)


def differentiable_once(grad: Tensor, refusal: str, *depends_on: Tensor | None) -> Tensor:
    """``grad``, marked as a function of ``depends_on`` whose derivative raises ``refusal``."""
    apply: Any = _NoDoubleBackward.apply
    marked: Tensor = apply(grad, refusal, *depends_on)
    return marked


class _NoDoubleBackward(torch.autograd.Function):
    # once_differentiable marks a gradient only if grad_y requires one: with a loss linear in y,
    # a gradient penalty would silently be a constant.

    @staticmethod
    def forward(ctx: Any, grad: Tensor, refusal: str, *depends_on: Tensor | None) -> Tensor:
        ctx.refusal = refusal
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise BackendError(ctx.refusal)
