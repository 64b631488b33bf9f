"""Rival 5: one grouped product of ragged inner size, ``torch.nn.functional.grouped_mm``."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contender import Layer, Unavailable
from bench.problem import Problem
from bench.rivals.bucketed_bmm import gathered_bytes
from bench.rivals.registry import register


def _transposed(x: Tensor, count: int) -> Tensor:
    """``(B, H d)`` to ``(H, B, d)``, contiguous."""
    return x.view(len(x), count, -1).transpose(0, 1).contiguous()


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        gathered: Tensor,
        offsets: Tensor,
        own: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(gathered, weight, offsets, own)
        experts = len(offsets)
        y = F.grouped_mm(gathered, weight, offs=offsets)  # (H, B, d)
        return (y.transpose(0, 1) + bias.view(experts, -1)).reshape(len(x), -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gathered, weight, offsets, own = ctx.saved_tensors
        experts, d = len(offsets), weight.shape[1]
        given = _transposed(grad, experts)
        grad_weight = F.grouped_mm(gathered.t(), given, offs=offsets)
        blocks = weight.view(-1, d, d).index_select(0, own)
        grad_x = torch.bmm(given, blocks.transpose(1, 2)).transpose(0, 1)
        return grad_x.reshape(len(grad), -1), grad_weight, grad.sum(0), None, None, None


@register
class GroupedMM(Layer):
    """Gather every expert's sources, multiply by the concatenated weights of the experts."""

    name = "grouped_mm"
    number = "5"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        if not hasattr(F, "grouped_mm"):
            raise Unavailable(f"torch {torch.__version__} has no torch.nn.functional.grouped_mm")
        if problem.width is None or not problem.is_hidden:
            raise Unavailable("needs blocks of one size and a gradient routed on the diagonal")
        self.width = d = problem.width
        ends = list(accumulate(len(sources) for sources in problem.sources))
        starts = [0, *ends]
        own = [starts[i] + sources.index(i) for i, sources in enumerate(problem.sources)]
        flat = [j for sources in problem.sources for j in sources]
        self.sources, self.own = (torch.tensor(v, device=problem.device) for v in (flat, own))
        self.offsets = torch.tensor(
            [end * d for end in ends], dtype=torch.int32, device=problem.device
        )
        matrices = problem.row_matrices(problem.compact.detach())
        weight = torch.cat([matrix.t() for matrix in matrices])  # (sum of fan-in, d)
        self.parameters = (weight.requires_grad_(), problem.bias)

    @classmethod
    def memory(cls, problem: Problem) -> int:
        return super().memory(problem) + gathered_bytes(problem)

    def gather(self, x: Tensor) -> Tensor:
        """Sources of all experts side by side, ``(B, sum of fan-in)``."""
        h = x.detach().view(len(x), -1, self.width)
        return h.index_select(1, self.sources).view(len(x), -1)

    def __call__(self, x: Tensor) -> Tensor:
        gathered = self.gather(x)
        apply: Any = _Function.apply
        y: Tensor = apply(x, *self.parameters, gathered, self.offsets, self.own)
        return y

    def compact_grads(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        sizes = list(self.problem.layout.row_fan_in)
        return torch.cat([g.t().reshape(-1) for g in grads[0].split(sizes)]), grads[1]


@register
class GroupedMMGathered(GroupedMM):
    """The same on sources that were gathered beforehand: the product alone."""

    name = "grouped_mm, gathered"
    note = "the gather is not in its time: a limit, not a layer"
    exact = False
    rotates = False

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.gathered = super().gather(problem.x)

    def gather(self, x: Tensor) -> Tensor:
        """What was gathered beforehand."""
        return self.gathered
