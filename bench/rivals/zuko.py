"""Rival 9: zuko's ``MaskedLinear`` on the same mask. It has no stop-gradient."""

from __future__ import annotations

from torch import Tensor, nn

from bench.contender import DenseLayer, Unavailable
from bench.problem import Problem
from bench.rivals.registry import register


@register
class Zuko(DenseLayer):
    """``zuko.nn.MaskedLinear(mask)``."""

    name = "zuko"
    number = "9"
    note = "no stop-gradient: another function backward"
    exact = False

    def __init__(self, problem: Problem) -> None:
        try:
            from zuko.nn import MaskedLinear
        except ImportError as error:
            raise Unavailable("zuko is not installed: pip install zuko") from error
        super().__init__(problem)
        # Built on "meta" and given the shared weight: a dense copy may not fit into memory.
        adjacency = problem.layout.mask().to(problem.device)
        self.layer = MaskedLinear(adjacency, device="meta")
        self.layer.weight = nn.Parameter(problem.dense.detach())
        self.layer.bias = nn.Parameter(problem.bias.detach())
        self.parameters = (self.layer.weight, self.layer.bias)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y
