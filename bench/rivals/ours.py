"""Our layer, with the backend that ``backend=None`` chooses, and with named backends."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from bench.contender import Layer
from bench.problem import Problem
from bench.rivals.registry import register
from maskmoe_kernels import masked_linear


@register
class Ours(Layer):
    """``masked_linear`` with a packed weight."""

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


@register
class OursTriton(Ours):
    """Our Triton kernels by name."""

    name = "ours, triton"
    backend = "triton"
    gpu_only = True


@register
class OursTorch(Ours):
    """Our PyTorch fallback by name: what a GPU without Triton runs."""

    name = "ours, torch"
    backend = "torch"
    gpu_only = True
