"""Rival 2: the masked product everybody writes first. It has no stop-gradient."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bench.layers.contender import Compiled, DenseLayer
from bench.layers.problem import Problem


class MaskedDense(DenseLayer):
    """``F.linear(x, W * M, b)``."""

    name = "masked dense"
    number = "2"
    note = "no stop-gradient: another function backward"
    exact = False

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.parameters
        return F.linear(x, weight * self.problem.mask, bias)


class MaskedBeforehand(DenseLayer):
    """``F.linear(x, W, b)`` with W masked before: what a checkpoint for inference would hold."""

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


class MaskedDenseCompiled(Compiled, MaskedDense):
    """``F.linear(x, W * M, b)`` under ``torch.compile``."""

    name = "masked dense, compiled"


class MaskedBeforehandCompiled(Compiled, MaskedBeforehand):
    """``F.linear(x, W, b)`` under ``torch.compile``."""

    name = "masked beforehand, compiled"
