"""Rival 2: the weight times a mask, in a dense product. It has no stop-gradient."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bench.contender import Compiled, DenseLayer
from bench.problem import Problem
from bench.rivals.registry import register


@register
class MaskedDense(DenseLayer):
    """``F.linear(x, W * M, b)``."""

    name = "masked dense"
    number = "2"
    note = "no stop-gradient: another function backward"
    exact = False

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.parameters
        return F.linear(x, weight * self.problem.mask, bias)


@register
class MaskedBeforehand(DenseLayer):
    """``F.linear(x, W, b)`` with W masked beforehand, as in a checkpoint for inference."""

    name = "masked beforehand"
    number = "2"
    note = "no stop-gradient, and absent weights get a gradient: another function backward"
    exact = False

    @classmethod
    def memory(cls, problem: Problem) -> int:
        layout = problem.layout
        whole = 2 * layout.out_features * layout.in_features
        rows = problem.batch * (layout.in_features + layout.out_features)
        return (whole + rows) * problem.dtype.itemsize

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.parameters)


@register
class MaskedDenseCompiled(Compiled, MaskedDense):
    """``F.linear(x, W * M, b)`` under ``torch.compile``."""

    name = "masked dense, compiled"


@register
class MaskedBeforehandCompiled(Compiled, MaskedBeforehand):
    """``F.linear(x, W, b)`` under ``torch.compile``."""

    name = "masked beforehand, compiled"
