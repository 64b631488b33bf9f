"""Floors: the time of a phase's FLOPs alone, and of its bytes alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.contender import Contender
from bench.counts import PHASES, count
from bench.problem import Problem
from bench.rivals.registry import register


@register
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
        shapes = (
            (inner, outputs),
            (outputs, routed),
            *[(problem.batch, inner)] * len(problem.sets),
        )
        self.weight, self.routed, *self.inputs = (
            torch.randn(shape, generator=problem.generator, device=problem.device).to(problem.dtype)
            for shape in shapes
        )

    @property
    def x(self) -> Tensor:
        """Its input that belongs to the selected set of the problem."""
        return self.inputs[self.problem.position]

    def forward(self) -> Tensor:
        return torch.mm(self.x, self.weight)

    def backward(self, graph: Any) -> tuple[Tensor, Tensor]:
        grad = self.problem.grad
        return torch.mm(self.x.t(), grad), torch.mm(grad, self.routed)

    def step(self) -> tuple[Tensor, ...]:
        return self.forward(), *self.backward(None)


@register
class FloorCopy(Contender):
    """A copy that reads half the bytes that must move and writes the other half."""

    name = "floor copy"
    number = "floor"
    note = "as many bytes, in one copy"
    floor = True

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        sizes = {phase: counts.bytes // 2 for phase, counts in count(problem).items()}
        longest = max(sizes.values())
        # Random values, since hardware may copy constant ones faster.
        rows = torch.empty(
            len(problem.sets), longest, dtype=torch.uint8, device=problem.device
        ).random_(generator=problem.generator)
        target = torch.empty_like(rows[0])
        self.pairs = {phase: (target[:n], rows[:, :n]) for phase, n in sizes.items()}

    @classmethod
    def memory(cls, problem: Problem) -> int:
        return count(problem)["step"].bytes

    def _copy(self, phase: str) -> Tensor:
        target, rows = self.pairs[phase]
        return target.copy_(rows[self.problem.position])

    def forward(self) -> Tensor:
        return self._copy(PHASES[0])

    def backward(self, graph: Any) -> Tensor:
        return self._copy(PHASES[1])

    def step(self) -> Tensor:
        return self._copy(PHASES[2])
