"""The routed gradient: one registered op forward, one backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from maskmoe_kernels.backends.activations import NEEDS_INPUT


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
    ) -> Tensor:
        """Output ``(*, out_features)``; keeps x, the weight and what the derivative needs."""
        y: Tensor
        z: Tensor
        y, z = torch.ops.maskmoe.masked_linear.default(
            x, weight, bias, plan, layout, out_features, activation, True
        )
        ctx.save_for_backward(x, weight, z if activation in NEEDS_INPUT else y, plan)
        ctx.layout = layout
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """grad_x, grad_weight and grad_bias, each only where needed."""
        x, weight, saved, plan = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_x, grad_weight, grad_bias = torch.ops.maskmoe.masked_linear_backward.default(
            grad_y, x, weight, saved, plan, ctx.layout, ctx.activation,
            need_x, need_weight, need_bias,
        )  # fmt: skip
        return (
            grad_x if need_x else None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            None,
            None,
            None,
            None,
        )
