"""The activations that belong to the op, with what their derivative needs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from maskmoe_kernels.errors import LayoutError

aten = torch.ops.aten

#: Name to function of the pre-activation z.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,  # slope 0.01 below zero, torch's default
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "silu": F.silu,
}

#: These derivatives need z; the others are functions of the output.
NEEDS_INPUT = frozenset({"gelu", "silu"})

# grad_z from (grad_y, saved), saved being z for NEEDS_INPUT and y for the others.
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda grad, _: grad,
    "relu": lambda grad, y: aten.threshold_backward(grad, y, 0),
    "leaky_relu": lambda grad, y: aten.leaky_relu_backward(grad, y, 0.01, True),
    "gelu": lambda grad, z: aten.gelu_backward(grad, z),
    "tanh": lambda grad, y: aten.tanh_backward(grad, y),
    "silu": lambda grad, z: aten.silu_backward(grad, z),
}


def activation_name(activation: str | None) -> str:
    """The registered name of ``activation``; ``None`` means ``"none"``.

    Raises:
        LayoutError: An activation the op does not have.
    """
    name = "none" if activation is None else activation
    if not isinstance(name, str) or name not in FUNCTIONS:
        raise LayoutError(
            f"activation must be None or one of {sorted(FUNCTIONS)}, got {activation!r}; apply "
            "any other element-wise function to the output"
        )
    return name


def grad_before(grad_y: Tensor, saved: Tensor, activation: str) -> Tensor:
    """grad_z from grad_y; ``saved`` is z for ``NEEDS_INPUT``, else y."""
    return _BACKWARD[activation](grad_y, saved)
