"""The routed gradient: one registered op forward, one backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maskmoe_kernels.backends.activations import NEEDS_INPUT
from maskmoe_kernels.errors import BackendError
from maskmoe_kernels.ops.registration import OPS

# Attribute look-ups on torch.ops cost as much as small layers do.
FORWARD = {name: getattr(torch.ops.maskmoe, name).default for name in OPS}
BACKWARD = {name: getattr(torch.ops.maskmoe, name + "_backward").default for name in OPS}


class MaskedLinearFunction(torch.autograd.Function):
    """y = act(W x + b) over present blocks; grad_x walks routed blocks only (section 3.4.2).

    grad_x is not the derivative of the forward wherever a block is present but not routed: the
    stop-gradient is work not done.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        plan: Tensor,
        layout: int,
        out_features: int,
        activation: str,
        op: str,
    ) -> Tensor:
        """Output ``(*, out_features)``; keeps x, the weight and what the derivative needs."""
        y: Tensor
        z: Tensor
        y, z = FORWARD[op](x, weight, bias, plan, layout, out_features, activation, True)
        saved = z if activation in NEEDS_INPUT or activation == "none" else y
        ctx.save_for_backward(x, weight, saved, plan, bias)
        ctx.layout = layout
        ctx.activation = activation
        ctx.op = op
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """grad_x, grad_weight and grad_bias, each only where needed."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return (*_gradients(ctx, grad_y), None, None, None, None, None)
        # create_graph=True: what is computed here depends on all of these, and must say so.
        x, weight, _, _, bias = ctx.saved_tensors
        with torch.no_grad():
            grads = _gradients(ctx, grad_y)
        mark: Any = _NoDoubleBackward.apply
        marked = [None if g is None else mark(g, grad_y, x, weight, bias) for g in grads]
        return (*marked, None, None, None, None, None)


def _gradients(ctx: Any, grad_y: Tensor) -> list[Tensor | None]:
    x, weight, saved, plan, _ = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    grads = BACKWARD[ctx.op](
        grad_y, x, weight, saved, plan, ctx.layout, ctx.activation, needs[0], needs[1], needs[2]
    )
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


class _NoDoubleBackward(torch.autograd.Function):
    # once_differentiable marks a gradient only if grad_y requires one: with a loss linear in y,
    # a gradient penalty would silently be a constant.

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *depends_on: Tensor | None) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise BackendError(
            "this backend cannot differentiate masked_linear twice; pass backend='reference', "
            "which can"
        )
