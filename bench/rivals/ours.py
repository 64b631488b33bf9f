"""Our layer, with the backend that ``backend=None`` chooses."""

from __future__ import annotations

from torch import Tensor

from maskmoe_kernels import BlockLayout, masked_linear


class Ours:
    """Packed weight, routed gradient."""

    name = "ours"
    note = ""

    def __init__(self, layout: BlockLayout, dense: Tensor, bias: Tensor) -> None:
        self.layout = layout
        self.weight = layout.pack(dense).detach().requires_grad_()
        self.bias = bias.clone().requires_grad_()
        self.parameters = (self.weight, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        """``(B, in)`` to ``(B, out)``."""
        return masked_linear(x, self.weight, self.bias, self.layout)

    def dense_grad(self) -> Tensor:
        """Gradient of the weight as ``(out, in)``."""
        return self.layout.unpack(self.weight.grad)
