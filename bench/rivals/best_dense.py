"""Rival 3: dense products with the exact routed gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.contender import Compiled, DenseLayer
from bench.problem import Problem
from bench.rivals.registry import register


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, d: int) -> Tensor:
        ctx.save_for_backward(x, weight, mask)
        ctx.d = d
        return torch.addmm(bias, x, weight.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask = ctx.saved_tensors
        grad_weight = (grad.t() @ x).mul_(mask)
        return _grad_x(grad, weight, ctx.d), grad_weight, grad.sum(0), None, None


def _grad_x(grad: Tensor, weight: Tensor, d: int) -> Tensor:
    """The diagonal blocks in one batch of products, each written where it belongs."""
    shape = (len(grad), grad.shape[1] // d, d)
    diagonal = weight.view(shape[1], d, shape[1], d).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    grad_x = grad.new_empty(shape)
    by_expert = grad.view(shape).transpose(0, 1)
    if torch.compiler.is_compiling():  # the compiler places results itself
        return torch.bmm(by_expert, diagonal).transpose(0, 1).reshape(len(grad), -1)
    torch.bmm(by_expert, diagonal, out=grad_x.transpose(0, 1))
    return grad_x.view(len(grad), -1)


class _Ragged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, routed: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mask, routed)
        return torch.addmm(bias, x, weight.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask, routed = ctx.saved_tensors
        return grad @ (weight * routed), (grad.t() @ x).mul_(mask), grad.sum(0), None, None


@register
class BestDense(DenseLayer):
    """Dense forward and dW, dX from the diagonal blocks alone.

    Its weight is masked once, not in every call: its gradient is masked, so no optimizer moves an
    absent weight away from zero.
    """

    name = "best dense"
    number = "3"
    note = "its weight stays masked, since its gradient is"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.width = problem.width if problem.is_hidden else None
        self.routed: Tensor | None = None
        if self.width is None:
            self.routed = problem.layout.grad_mask().to(problem.mask)

    @classmethod
    def flops(cls, problem: Problem) -> int:
        layout = problem.layout
        dense = 2 * layout.out_features * layout.in_features
        return 2 * problem.batch * (dense + layout.num_routed_weights)

    @classmethod
    def memory(cls, problem: Problem) -> int:
        # Weight, mask, gradient.
        layout = problem.layout
        whole = 3 * layout.out_features * layout.in_features
        rows = problem.batch * (layout.in_features + layout.out_features)
        return (whole + rows) * problem.dtype.itemsize

    def __call__(self, x: Tensor) -> Tensor:
        kind, how = (_Ragged, self.routed) if self.width is None else (_Function, self.width)
        apply: Any = kind.apply
        y: Tensor = apply(x, *self.parameters, self.problem.mask, how)
        return y


@register
class BestDenseCompiled(Compiled, BestDense):
    """The same under ``torch.compile``."""

    name = "best dense, compiled"
