"""The definition of the masked linear map: float64 dense algebra with ``detach``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.blocks import BlockLayout

# Written out again on purpose: the definition shares no table with the code it judges.
_ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "none": lambda z: z,
    "relu": torch.relu,
    "leaky_relu": lambda z: torch.where(z > 0, z, 0.01 * z),
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "silu": lambda z: z * torch.sigmoid(z),
}


def dense_oracle(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: BlockLayout,
    activation: str | None = None,
) -> Tensor:
    """The masked linear map in float64; its gradients are derived by autograd.

    Unit o of the output is (eq. 14, with M the mask and G the gradient mask)::

        y_o = act(b_o + sum over f with M_of of W_of * (x_f if G_of else stop_gradient(x_f)))

    An unseen feature is not in the sum, so its value cannot matter, NaN and Inf included.

    Args:
        x: ``(*, in_features)``, any floating-point type.
        weight: Packed blocks, ``(layout.num_weights,)``.
        bias: ``(out_features,)`` or ``None``.
        layout: Which blocks exist and which route a gradient.
        activation: As in :func:`masked_linear`.

    Returns:
        ``(*, out_features)``, float64, differentiable in ``x``, ``weight`` and ``bias``.

    Raises:
        LayoutError: A shape that does not fit, or an unknown activation.
    """
    inputs = (x.double(), weight.double(), None if bias is None else bias.double())
    return dense_algebra(*inputs, layout, activation)


def dense_algebra(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: BlockLayout,
    activation: str | None = None,
) -> Tensor:
    """:func:`dense_oracle` in the dtype of its inputs: what plain PyTorch makes of it."""
    _check(x, bias, layout, activation)
    dense = layout.unpack(weight)
    mask, routed = layout.mask().to(x.device), layout.grad_mask().to(x.device)
    patterns, which = torch.unique(torch.cat([mask, routed], 1), dim=0, return_inverse=True)
    outputs, order = [], []
    for k, pattern in enumerate(patterns):
        units = (which == k).nonzero().squeeze(1)
        features = pattern[: layout.in_features].nonzero().squeeze(1)
        seen = x[..., features]
        seen = torch.where(pattern[layout.in_features :][features], seen, seen.detach())
        outputs.append(F.linear(seen, dense[units][:, features]))
        order.append(units)
    z = torch.cat(outputs, dim=-1)[..., torch.cat(order).argsort()]
    return _ACTIVATIONS[activation](z if bias is None else z + bias)


def _check(x: Tensor, bias: Tensor | None, layout: BlockLayout, activation: str | None) -> None:
    if activation not in _ACTIVATIONS:
        raise LayoutError(
            f"activation must be None or one of {[a for a in _ACTIVATIONS if a]}, "
            f"got {activation!r}"
        )
    if x.dim() == 0 or x.shape[-1] != layout.in_features:
        raise LayoutError(
            f"x must be (*, in_features) with in_features={layout.in_features}, got "
            f"{tuple(x.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (layout.out_features,):
        raise LayoutError(
            f"bias must be (out_features,) = ({layout.out_features},), got {tuple(bias.shape)}"
        )
