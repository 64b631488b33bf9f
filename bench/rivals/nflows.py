"""Rival 9: nflows' ``MaskedLinear`` with the same mask. It has no stop-gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.contender import DenseLayer, Unavailable
from bench.problem import Problem
from bench.rivals.registry import register


@register
class Nflows(DenseLayer):
    """``nflows.transforms.made.MaskedLinear``, its mask replaced by the problem's."""

    name = "nflows"
    number = "9"
    note = "no stop-gradient: another function backward"
    exact = False

    def __init__(self, problem: Problem) -> None:
        try:
            from nflows.transforms.made import MaskedLinear
        except ImportError as error:
            raise Unavailable("nflows is not installed: pip install nflows") from error
        super().__init__(problem)
        # Its constructor derives a mask from degrees: build a small layer, then replace the mask.
        self.layer = MaskedLinear(torch.arange(1, 3), 2, 2, random_mask=False, is_output=False)
        self.layer.mask = problem.mask
        self.layer.weight = nn.Parameter(problem.dense.detach())
        self.layer.bias = nn.Parameter(problem.bias.detach())
        self.parameters = (self.layer.weight, self.layer.bias)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y
