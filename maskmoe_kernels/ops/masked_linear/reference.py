"""Plain differentiable PyTorch: slow, any dtype, and every transform of torch works on it.

The stop-gradient is written as ``detach``; absent blocks are never gathered. Autograd derives
everything else, so double backward, ``torch.func.grad`` and ``torch.func.vmap`` work here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskmoe_kernels._compat import constant_in_trace
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.ops.activations import FUNCTIONS


def masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: BlockLayout, activation: str
) -> Tensor:
    """``x`` ``(*, in)`` to ``(*, out)``, one gather and one product per row block."""
    order = layout.col_order
    if order is not None:
        x = x[..., layout.table("col_order", x.device, lambda: order)]
    held = x.detach()
    columns = torch.arange(layout.in_features, device=x.device).split(list(layout.col_sizes))
    # Without a column, x is in the graph all the same: where nothing routes, its gradient is 0.
    nothing = x[..., :0]
    outputs = []
    for i, blocks in enumerate(_blocks(layout)):
        seen = [(x if routed else held)[..., columns[j]] for j, routed in blocks]
        features = torch.cat([nothing, *seen], dim=-1)
        start, stop = layout.weight_offsets[i : i + 2]
        shape = (layout.row_fan_in[i], layout.row_sizes[i])
        outputs.append(features @ weight[start:stop].view(shape))
    z = torch.cat(outputs, dim=-1)
    if layout.row_order is not None:
        z = z[..., layout.table("row_rank", x.device, layout.row_order.argsort)]
    return FUNCTIONS[activation](z if bias is None else z + bias)


@constant_in_trace
def _blocks(layout: BlockLayout) -> list[list[tuple[int, bool]]]:
    """For each row block, the column blocks it reads, ascending, and whether they route."""
    routes = layout.routes_grad.tolist()
    return [[(j, routes[i][j]) for j in blocks] for i, blocks in enumerate(layout.row_blocks())]
