"""Rival 8: stk's block-sparse products, experts merged into its blocks of 128 by 128.

``stk.Matrix(size, data, row_indices, column_indices, offsets)`` of stanford-stk 0.7;
``stk.ops.dds`` multiplies a dense matrix by a sparse one, ``stk.ops.sdd`` gives the entries of a
dense product that a sparse matrix has. All sizes must be multiples of 128, the batch included.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contender import DenseLayer, Unavailable
from bench.problem import Problem
from bench.rivals.registry import register

BLOCK = 128


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, data: Tensor, bias: Tensor, layer: StkMatrix) -> Tensor:
        x = F.pad(x, (0, layer.padding)) if layer.padding else x
        ctx.save_for_backward(x, data)
        ctx.layer = layer
        y: Tensor = layer.ops.dds(x, layer.matrix(data))
        return y[:, : len(bias)] + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, data = ctx.saved_tensors
        layer: StkMatrix = ctx.layer
        padded = F.pad(grad, (0, layer.padding)) if layer.padding else grad
        grad_data = layer.ops.sdd(x.t(), padded, layer.matrix(data)).data.mul_(layer.seen)
        experts = grad.shape[1] // layer.width
        blocks = layer.own_blocks(data)[:experts]  # (H, in, out)
        given = grad.view(len(grad), experts, -1).transpose(0, 1)
        grad_x = grad.new_empty(len(grad), experts, layer.width)
        torch.bmm(given, blocks.transpose(1, 2), out=grad_x.transpose(0, 1))
        return grad_x.view(len(grad), -1), grad_data, grad.sum(0), None


@register
class StkMatrix(DenseLayer):
    """``stk.ops.dds(x, W^T)``, dW by ``stk.ops.sdd``, dX by ``bmm`` on the diagonal."""

    name = "stk"
    number = "8"
    note = "multiplies whole blocks of 128; its weight stays masked, since its gradient is"
    gpu_only = True

    def __init__(self, problem: Problem) -> None:
        try:
            import stk
        except ImportError as error:
            raise Unavailable("stk is not installed: pip install stanford-stk") from error
        d = problem.width
        if d is None or not problem.is_hidden or BLOCK % d:
            raise Unavailable(
                "needs blocks of one size that divides 128, and a gradient routed on the diagonal"
            )
        if problem.batch % BLOCK:
            raise Unavailable(f"needs a multiple of 128 rows, not {problem.batch}")
        if problem.dtype == torch.float32 and not problem.tf32:
            raise Unavailable("multiplies float32 in tf32 only")
        super().__init__(problem)
        self.stk, self.ops, self.width = stk, stk.ops, d
        self.padding = -problem.layout.in_features % BLOCK
        seen = self._blocks(problem.mask)
        present = seen.flatten(2).any(-1)  # (in, out) in blocks of 128
        self.at = present.nonzero()
        self.seen = self._pick(seen)
        data = self._pick(self._blocks(problem.dense.detach())).requires_grad_()
        rows, self.columns = (part.to(torch.int32) for part in self.at.unbind(1))
        self.rows = rows
        self.offsets = F.pad(present.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        self.diagonal = (self.at[:, 0] == self.at[:, 1]).nonzero().flatten()
        side = BLOCK * len(present)
        whole = stk.Matrix((side, side), data.detach(), rows, self.columns, self.offsets)
        # Derived from the pattern, so computed once.
        self.transposed = (whole.column_indices_t, whole.offsets_t, whole.block_offsets_t)
        self.size = (side, side)
        self.parameters = (data, problem.bias)

    def matrix(self, data: Tensor) -> Any:
        """W^T with these blocks."""
        pattern = (self.rows, self.columns, self.offsets, *self.transposed)
        return self.stk.Matrix(self.size, data, *pattern)

    def own_blocks(self, data: Tensor) -> Tensor:
        """Each expert's own d by d block of W^T, ``(experts and padding, in, out)``."""
        per = BLOCK // self.width
        blocks = data.index_select(0, self.diagonal).view(-1, per, self.width, per, self.width)
        return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).flatten(0, 1)

    def _blocks(self, dense: Tensor) -> Tensor:
        """An ``(out, in)`` matrix as ``(in, out)`` blocks of 128 by 128."""
        transposed = F.pad(dense, (0, self.padding, 0, self.padding)).t()
        count = len(transposed) // BLOCK
        return transposed.reshape(count, BLOCK, count, BLOCK).transpose(1, 2)

    def _pick(self, blocks: Tensor) -> Tensor:
        return blocks[self.at[:, 0], self.at[:, 1]].contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        apply: Any = _Function.apply
        y: Tensor = apply(x, *self.parameters, self)
        return y

    def compact_grads(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        layout = self.problem.layout
        count = self.size[0] // BLOCK
        blocks = grads[0].new_zeros(count, count, BLOCK, BLOCK)
        blocks[self.at[:, 0], self.at[:, 1]] = grads[0]
        transposed = blocks.transpose(1, 2).reshape(self.size)
        dense = transposed.t()[: layout.out_features, : layout.in_features]
        return self.problem.from_dense(dense.contiguous()), grads[1]
