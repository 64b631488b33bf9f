"""Rival 2: the masked product everybody writes first."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from maskmoe_kernels import BlockLayout


class MaskedDense:
    """``F.linear(x, W * M, b)``."""

    name = "masked dense"
    note = "no stop-gradient: another function backward"

    def __init__(self, layout: BlockLayout, dense: Tensor, bias: Tensor) -> None:
        self.mask = layout.mask().to(dense.dtype)
        self.weight = dense.clone().requires_grad_()
        self.bias = bias.clone().requires_grad_()
        self.parameters = (self.weight, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        """``(B, in)`` to ``(B, out)``."""
        return F.linear(x, self.weight * self.mask, self.bias)

    def dense_grad(self) -> Tensor:
        """Gradient of the weight as ``(out, in)``."""
        return self.weight.grad
