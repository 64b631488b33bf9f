"""The definition of the masked linear map: dense algebra with ``detach``.

In float64 it is what every implementation is compared with. In the tensors' own dtype it is the
backend ``"reference"``: slow, but autograd derives all of it, so that double backward,
``torch.func.grad`` and ``torch.func.vmap`` work.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from maskmoe_kernels._compat import constant_in_trace
from maskmoe_kernels.layout.arguments import check_kind
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.ops.activations import activation_name
from maskmoe_kernels.ops.checks import check_linear

# Written out again on purpose: the definition shares no table with the code that it judges.
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
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
    activation_name(activation)
    check_kind(Tensor, x=x, weight=weight)
    if bias is not None:
        check_kind(Tensor, bias=bias)
    check_kind(BlockLayout, layout=layout)
    inputs = (x.double(), weight.double(), None if bias is None else bias.double())
    check_linear(*inputs, layout)
    return masked_linear(*inputs, layout, activation)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: BlockLayout,
    activation: str | None = None,
) -> Tensor:
    """:func:`dense_oracle` in the dtype of its inputs: what plain PyTorch makes of it."""
    dense = layout.unpack(weight)
    outputs, order = [], []
    # As a matrix: of more dimensions, torch folds some where a gradient is asked for, and then the
    # bits are others.
    matrix = x.reshape(-1, layout.in_features)
    for units, features, routed in _patterns(layout):
        columns = torch.tensor(features, dtype=torch.int64, device=x.device)
        rows = torch.tensor(units, device=x.device)
        seen = matrix[:, columns]
        seen = torch.where(torch.tensor(routed, device=x.device).bool(), seen, seen.detach())
        outputs.append(F.linear(seen, dense[rows][:, columns]))
        order.append(rows)
    z = torch.cat(outputs, dim=-1)[:, torch.cat(order).argsort()]
    z = z.reshape(*x.shape[:-1], layout.out_features)
    return ACTIVATIONS[activation](z if bias is None else z + bias)


Pattern = tuple[list[int], list[int], list[bool]]


@constant_in_trace
def _patterns(layout: BlockLayout) -> list[Pattern]:
    """Units that see and route alike, the features that they see, and which of those route."""
    return layout.caches.derive("reference patterns", lambda: _find_patterns(layout))


def _find_patterns(layout: BlockLayout) -> list[Pattern]:
    mask, routed = layout.mask(), layout.grad_mask()
    rows, which = torch.unique(torch.cat([mask, routed], 1), dim=0, return_inverse=True)
    found: list[Pattern] = []
    for k, (sees, routes) in enumerate(row.chunk(2) for row in rows):
        features = sees.nonzero().squeeze(1)
        units = (which == k).nonzero().squeeze(1)
        found.append((units.tolist(), features.tolist(), routes[features].tolist()))
    return found
