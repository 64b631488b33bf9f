"""Is ``MaskedLinear`` faster than ``F.linear(x, weight * mask, bias)``? A static model of the cost.

A call of a layer takes a sum of products of a price and an amount. Amounts follow from the mask and
the number of rows; prices were fitted to measurements of layers of zuko and pyro and of random
masks, at 256 to 4096 rows (``python -m bench flows`` checks what follows from them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.serialized import transposed_layout
from maskmoe_kernels.ops.dispatch import choose, unsupported_reason

# Without a number of rows, a layer has to gain at all of these.
ROWS = (256, 1024, 4096)
# How many times as fast a layer has to be by the model, whose errors are about as large for layers
# of few units.
LEAST_GAIN = 1.25
#: Entries of the mask; below, a call costs as much as what is saved, and the prices say too little.
LEAST_SIZE = 1 << 15


class DensePrices(NamedTuple):
    """Nanoseconds of a masked dense layer, on one core."""

    call: float
    product: float  # a row and weight, absent ones included
    copy: float  # a row and feature or unit
    mask: float  # a weight, absent ones included: multiplied by its mask
    activation: float  # a row and hidden unit of a network, at least: ours apply it on the way


class OurPrices(NamedTuple):
    """Nanoseconds of ours, on one core."""

    call: float  # between layers of other kinds, where it takes longer than call after call
    product: float  # a row and step of a panel; in a step of training, of three products
    masked: float  # more, where not all units of the panel see the input; of two products
    copy: float  # a row and feature or unit
    move: float  # more, a row and interleaved feature or unit
    pack: float  # a present weight


# AMD EPYC (Zen 3), AVX2, float32, torch 2.13. Other processors change all prices, ratios hardly.
FORWARD = (
    DensePrices(21e3, 0.0230, 0.208, 1.07, 0.3),
    OurPrices(35e3, 0.357, 0.024, 0.234, 0.235, 0.61),
)
STEP = (
    DensePrices(131e3, 0.0641, 1.51, 4.20, 1.0),
    OurPrices(230e3, 0.349, 0.082, 0.869, 0.606, 3.61),
)


def why_no_gain(
    layouts: Sequence[BlockLayout], weight: Tensor, batch: int | None, backend: str | None
) -> str | None:
    """Why layers of these masks would not be faster as ours, in words; None if they would.

    Args:
        layouts: Of one layer; or of all layers of a network that hands units on in block order.
        weight: Of a dense layer, whose device and dtype count.
        batch: Rows; ``None``: those of ``ROWS``.
        backend: That was asked for.
    """
    reason = None
    for layout in layouts:
        reason = reason or unsupported_reason("masked_linear", "native", layout, (weight,))
        if reason is None and choose("masked_linear", backend, layout, (weight,)) != "native":
            reason = f"backend {backend!r} was asked for"
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or reason is not None:
        reason = reason or f"{weight.dtype} on {weight.device}"
        return f"a gain was measured for the CPU's float32 kernels only ({reason})"
    size = sum(layout.in_features * layout.out_features for layout in layouts)
    if size < LEAST_SIZE:
        return f"no gain expected: its mask has {size:,} entries, less than {LEAST_SIZE:,}"
    for rows in (batch,) if batch is not None else ROWS:
        for phase, gain in zip(("forward", "step"), gains(layouts, rows), strict=True):
            if gain < LEAST_GAIN:
                return f"no gain expected: {gain:.2f} times as fast in {phase} at {rows} rows"
    return None


def gains(layouts: BlockLayout | Sequence[BlockLayout], rows: int) -> tuple[float, float]:
    """How many times as fast as masked dense layers ours should be: forward, and step."""
    all_layouts = [layouts] if isinstance(layouts, BlockLayout) else layouts
    ratios = []
    for prices, work in ((FORWARD, _work_forward), (STEP, _work_step)):
        costs = [_costs(layout, rows, *prices, *work(layout)) for layout in all_layouts]
        before, after = (sum(column) for column in zip(*costs, strict=True))
        passes = prices[0].activation * rows * sum(of.out_features for of in all_layouts[:-1])
        ratios.append((before + passes) / after)
    return ratios[0], ratios[1]


def _costs(
    layout: BlockLayout, rows: int, dense: DensePrices, ours: OurPrices, steps: int, masked: int
) -> tuple[float, float]:
    """Nanoseconds of a call, dense and ours."""
    size = layout.in_features * layout.out_features
    edges = layout.in_features + layout.out_features
    moved = layout.in_features * (layout.col_order is not None)
    moved += layout.out_features * (layout.row_order is not None)
    before = dense.product * size + dense.copy * edges
    after = ours.product * steps + ours.masked * masked + ours.copy * edges + ours.move * moved
    return (
        dense.call + dense.mask * size + rows * before,
        ours.call + ours.pack * layout.num_weights + rows * after,
    )


def _work_forward(layout: BlockLayout) -> tuple[int, int]:
    """Steps of panels, and those of them with a mask."""
    return layout.panel_steps


def _work_step(layout: BlockLayout) -> tuple[int, int]:
    walked, masked = layout.panel_steps
    transposed, _ = layout.caches.derive("transposed", lambda: transposed_layout(layout))
    walked_back, masked_back = transposed.panel_steps
    return 2 * walked + walked_back, masked + masked_back
