"""The kernels of a GPU, called without the dispatcher, where nobody listens to it.

The dispatcher and what belongs to an op (the plan, its checks, outputs that are always tensors)
take longer than a small layer's kernels do. Modes, traces and profilers see the op as ever.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from maskmoe_kernels._compat import plain_call
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.ops.activations import NEEDS_INPUT
from maskmoe_kernels.ops.checks import PLAIN
from maskmoe_kernels.ops.masked_linear.autograd import BACKWARD, once


def unwatched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Would the op's kernel get just these tensors, and nobody notice that it was called?"""
    return (
        type(x) in PLAIN
        and type(weight) in PLAIN
        and type(bias) in PLAIN
        and plain_call(x)
        and not weight.is_neg()
        and (bias is None or not bias.is_neg())
    )


class DirectFunction(torch.autograd.Function):
    """:class:`MaskedLinearFunction` of kernels that are called as such.

    What has no gradient comes as one argument: small layers feel every one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        fixed: tuple[Any, BlockLayout, str, str, Tensor],
    ) -> Tensor:
        """Output ``(*, out_features)``; keeps x, the weight and what the derivative needs."""
        kernels, layout, activation, _, _ = fixed
        y: Tensor
        y, z = kernels.output(x, weight, bias, layout, activation, True)
        saved = z if activation in NEEDS_INPUT else None if activation == "none" else y
        ctx.save_for_backward(x, weight, saved, bias)
        ctx.fixed = fixed
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """grad_x, grad_weight and grad_bias, each only where needed."""
        x, weight, saved, bias = ctx.saved_tensors
        kernels, layout, activation, op, plan = ctx.fixed
        needs = ctx.needs_input_grad[:3]
        saved = grad_y if saved is None else saved  # which nobody reads
        graph = torch.is_grad_enabled()
        with torch.no_grad() if graph else nullcontext():
            # A hook may have given other tensors back than were saved.
            if unwatched(grad_y, weight) and type(x) in PLAIN and type(saved) in PLAIN:
                grads = kernels.gradients(grad_y, x, weight, saved, layout, activation, needs)
            else:
                found = BACKWARD[op](grad_y, x, weight, saved, plan, layout.id, activation, *needs)
                grads = (g if need else None for g, need in zip(found, needs, strict=True))
        return (*(once(grads, grad_y, x, weight, bias) if graph else grads), None)


# Function.apply looks for torch.func's wrappers first, as for MaskedLinearFunction.
DIRECT: Any = super(torch.autograd.Function, DirectFunction).apply
