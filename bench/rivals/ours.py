"""Our layer, with the backend that ``backend=None`` chooses."""

from __future__ import annotations

from torch import Tensor

from bench.contender import Layer
from bench.problem import Problem
from maskmoe_kernels import masked_linear


class Ours(Layer):
    """Packed weight, routed gradient."""

    name = "ours"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.parameters = (problem.packed, problem.bias)

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.parameters
        return masked_linear(x, weight, bias, self.problem.layout)

    def compact_grads(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return self.problem.from_packed(grads[0]), grads[1]
