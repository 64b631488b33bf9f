"""Floors: what the FLOPs and the bytes of a phase cost when nothing else is in the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.contender import Contender
from bench.counts import PHASES, count
from bench.problem import Problem


class FloorGemm(Contender):
    """Dense products with as many FLOPs as the present blocks, nothing gathered or skipped.

    Forward: (B, K) by (K, N), N the output features and K the mean fan-in, rounded. Backward:
    dW of that product, and dX as (B, N) by (N, K') with N K' the routed weights.
    """

    name = "floor gemm"
    number = "floor"
    note = "as many FLOPs, in plain dense products"
    floor = True

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        layout, outputs = problem.layout, problem.layout.out_features
        inner, routed = (
            max(1, round(weights / outputs))
            for weights in (layout.num_weights, layout.num_routed_weights)
        )
        self.x, self.weight, self.routed = (
            torch.randn(shape, dtype=problem.dtype, device=problem.device)
            for shape in ((problem.batch, inner), (inner, outputs), (outputs, routed))
        )

    def forward(self) -> Tensor:
        return torch.mm(self.x, self.weight)

    def backward(self, graph: Any) -> tuple[Tensor, Tensor]:
        grad = self.problem.grad
        return torch.mm(self.x.t(), grad), torch.mm(grad, self.routed)

    def step(self) -> tuple[Tensor, ...]:
        return self.forward(), *self.backward(None)


class FloorCopy(Contender):
    """A copy that reads half the bytes that must move and writes the other half."""

    name = "floor copy"
    number = "floor"
    note = "as many bytes, in one copy"
    floor = True

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        sizes = {phase: counts.bytes // 2 for phase, counts in count(problem).items()}
        source = torch.ones(max(sizes.values()), dtype=torch.uint8, device=problem.device)
        target = torch.empty_like(source)
        self.pairs = {phase: (target[:n], source[:n]) for phase, n in sizes.items()}

    @classmethod
    def memory(cls, problem: Problem) -> int:
        return count(problem)["step"].bytes

    def _copy(self, phase: str) -> Tensor:
        target, source = self.pairs[phase]
        return target.copy_(source)

    def forward(self) -> Tensor:
        return self._copy(PHASES[0])

    def backward(self, graph: Any) -> Tensor:
        return self._copy(PHASES[1])

    def step(self) -> Tensor:
        return self._copy(PHASES[2])
