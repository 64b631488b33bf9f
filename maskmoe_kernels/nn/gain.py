"""Is ``MaskedLinear`` faster than ``F.linear(x, weight * mask, bias)``? A static model of the cost.

A call of a layer takes a sum of products of a price and an amount. Amounts follow from the mask and
the number of rows; prices were fitted to measurements of layers of zuko and pyro and of random
masks, at 256 to 4096 rows (``python -m bench flows`` checks what follows from them).
"""

from __future__ import annotations

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


class OurPrices(NamedTuple):
    """Nanoseconds of ours, on one core."""

    call: float  # between layers of other kinds, where it takes longer than call after call
    product: float  # a row and step of a panel; in a step of training, of three products
    masked: float  # more, where not all units of the panel see the input; of two products
    copy: float  # a row and feature or unit
    move: float  # more, a row and interleaved feature or unit
    pack: float  # a present weight


# AMD EPYC (Zen 3), AVX2, float32, torch 2.13. Other processors change all prices, ratios hardly.
FORWARD = DensePrices(21e3, 0.0230, 0.208, 1.07), OurPrices(35e3, 0.357, 0.024, 0.234, 0.235, 0.61)
STEP = DensePrices(131e3, 0.0641, 1.51, 4.20), OurPrices(230e3, 0.349, 0.082, 0.869, 0.606, 3.61)


def why_no_gain(
    layout: BlockLayout, weight: Tensor, batch: int | None, backend: str | None
) -> str | None:
    """Why a layer of this mask would not be faster as ours, in words; None if it would.

    Args:
        layout: Of the mask.
        weight: Of the dense layer, whose device and dtype count.
        batch: Rows; ``None``: those of ``ROWS``.
        backend: That was asked for.
    """
    reason = unsupported_reason("masked_linear", "native", layout, (weight,))
    if reason is None and choose("masked_linear", backend, layout, (weight,)) != "native":
        reason = f"backend {backend!r} was asked for"
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or reason is not None:
        reason = reason or f"{weight.dtype} on {weight.device}"
        return f"a gain was measured for the CPU's float32 kernels only ({reason})"
    size = layout.in_features * layout.out_features
    if size < LEAST_SIZE:
        return f"no gain expected: its mask has {size:,} entries, less than {LEAST_SIZE:,}"
    for rows in (batch,) if batch is not None else ROWS:
        for phase, gain in zip(("forward", "step"), gains(layout, rows), strict=True):
            if gain < LEAST_GAIN:
                return f"no gain expected: {gain:.2f} times as fast in {phase} at {rows} rows"
    return None


def gains(layout: BlockLayout, rows: int) -> tuple[float, float]:
    """How many times as fast as a masked dense layer ours should be: forward, and step."""
    size = layout.in_features * layout.out_features
    edges = layout.in_features + layout.out_features
    moved = layout.in_features * (layout.col_order is not None)
    moved += layout.out_features * (layout.row_order is not None)
    walked, masked = layout.panel_steps
    transposed, _ = layout.caches.derive("transposed", lambda: transposed_layout(layout))
    walked_back, masked_back = transposed.panel_steps

    def ratio(prices: tuple[DensePrices, OurPrices], steps: int, with_mask: int) -> float:
        dense, ours = prices
        before = dense.product * size + dense.copy * edges
        after = ours.product * steps + ours.masked * with_mask
        after += ours.copy * edges + ours.move * moved
        return (dense.call + dense.mask * size + rows * before) / (
            ours.call + ours.pack * layout.num_weights + rows * after
        )

    return (
        ratio(FORWARD, walked, masked),
        ratio(STEP, 2 * walked + walked_back, masked + masked_back),
    )
