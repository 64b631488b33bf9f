"""Our layer, with the backend that ``backend=None`` chooses, and with others by name."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from bench.layers.contender import Layer
from bench.layers.problem import Problem
from maskmoe_kernels import masked_linear


class Ours(Layer):
    """Packed weight, routed gradient."""

    name = "ours"
    backend: ClassVar[str | None] = None

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.parameters = (problem.packed, problem.bias)

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.parameters
        return masked_linear(x, weight, bias, self.problem.layout, backend=self.backend)

    def compact_grads(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return self.problem.from_packed(grads[0]), grads[1]


class OursTriton(Ours):
    """Our Triton kernels by name."""

    name = "ours, triton"
    backend = "triton"


class OursGrouped(Ours):
    """Our PyTorch fallback by name: what a GPU without our kernels would run."""

    name = "ours, torch"
    backend = "torch"
