"""Rival 6: QuACK's GEMM of ragged inner size that gathers its operand as it loads (from Hopper on).

``quack.gemm_interface.gemm`` of quack-kernels 0.6: with ``cu_seqlens_k`` it multiplies
``A[:, A_idx[span]]`` by ``B[span]`` for each span, A column-major; with ``cu_seqlens_m``
``A[A_idx[span]]`` by ``B[l]``, A row-major. So one transposed copy of x serves the forward and the
weight's gradient.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.contender import Unavailable
from bench.problem import Problem
from bench.rivals.grouped_mm import GroupedMM
from bench.rivals.registry import register


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: Quack) -> Tensor:
        transposed = x.t().contiguous()  # (in, B)
        ctx.save_for_backward(transposed, weight)
        ctx.layer = layer
        experts = len(layer.own)
        y = x.new_empty(len(x), experts, weight.shape[1])
        layer.gemm(
            transposed.t(),
            weight,
            out=y.transpose(0, 1),  # (H, B, d), where it belongs
            bias=bias.view(experts, -1),
            cu_seqlens_k=layer.ends,
            A_idx=layer.features,
            tuned=layer.tuned,
        )
        return y.view(len(x), -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        transposed, weight = ctx.saved_tensors
        layer, d = ctx.layer, weight.shape[1]
        given = grad.view(len(grad), -1, d).transpose(0, 1)  # (H, B, d)
        grad_weight = layer.gemm(
            transposed, given, cu_seqlens_m=layer.ends, A_idx=layer.features, tuned=layer.tuned
        )
        blocks = weight.view(-1, d, d).index_select(0, layer.own)
        grad_x = grad.new_empty(len(grad), len(blocks), d)
        torch.bmm(given, blocks.transpose(1, 2), out=grad_x.transpose(0, 1))
        return grad_x.view(len(grad), -1), grad_weight, grad.sum(0), None


@register
class Quack(GroupedMM):
    """One ragged product that gathers as it loads; dX by ``bmm`` on the diagonal."""

    name = "QuACK"
    number = "6"
    note = "its default configuration; x is copied once, transposed"
    tuned: ClassVar[bool] = False
    gpu_only = True

    def __init__(self, problem: Problem) -> None:
        try:
            from quack.gemm_interface import gemm
        except Exception as error:  # its import asks for a GPU, and raises what it likes
            reason = " ".join(str(error).split())
            raise Unavailable(
                f"quack is not installed, or does not work here ({reason}): pip install "
                "quack-kernels"
            ) from error
        if problem.dtype not in (torch.bfloat16, torch.float16):
            raise Unavailable("gathers column-major operands of 16 bits only")
        super().__init__(problem)
        self.gemm = gemm
        step = torch.arange(self.width, dtype=torch.int32, device=problem.device)
        first = self.sources.to(torch.int32) * self.width
        self.features = (first[:, None] + step).flatten()  # (sum of fan-in,)
        self.ends = torch.nn.functional.pad(self.offsets, (1, 0))

    @classmethod
    def memory(cls, problem: Problem) -> int:
        """A transposed copy of x; nothing is gathered in memory."""
        rows = problem.batch * problem.layout.in_features
        return super(GroupedMM, cls).memory(problem) + rows * problem.dtype.itemsize

    def __call__(self, x: Tensor) -> Tensor:
        apply: Any = _Function.apply
        y: Tensor = apply(x, *self.parameters, self)
        return y


@register
class QuackTuned(Quack):
    """The same with its autotuner, which compiles every configuration."""

    name = "QuACK, tuned"
    note = "its autotuner; x is copied once, transposed"
    compiled = True
    tuned = True
