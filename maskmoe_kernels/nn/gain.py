"""Is ``MaskedLinear`` faster than ``F.linear(x, weight * mask, bias)``? A static model of the cost.

A call of a layer takes a sum of products of a price and an amount. Amounts follow from the mask and
the number of rows; prices were fitted to measurements of 81 layers of zuko, nflows and pyro and of
random masks, at 64 to 4096 rows (``python -m bench flows`` checks what follows from them).
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
# How many times as fast a layer has to be by the model, whose errors are about as large.
LEAST_GAIN = 1.1


class DensePrices(NamedTuple):
    """Nanoseconds of a masked dense layer, on one core."""

    call: float
    product: float  # a row and weight, absent ones included
    copy: float  # a row and feature or unit
    mask: float  # a weight, absent ones included: multiplied by its mask


class OurPrices(NamedTuple):
    """Nanoseconds of ours, on one core."""

    call: float
    product: float  # a row and weight in a panel; backward, three products
    masked: float  # more, a row and absent weight in a panel
    copy: float  # a row and feature or unit
    move: float  # more, a row and interleaved feature or unit
    pack: float  # a present weight


# AMD EPYC (Zen 3), AVX2, float32, torch 2.13. Other processors change all prices, ratios hardly.
FORWARD = DensePrices(20e3, 0.0212, 0.17, 1.1), OurPrices(23e3, 0.0212, 0.041, 0.19, 0.30, 0.6)
STEP = DensePrices(137e3, 0.0624, 0.98, 2.7), OurPrices(139e3, 0.0210, 0.051, 0.59, 0.57, 2.2)


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
    for rows in (batch,) if batch is not None else ROWS:
        for phase, gain in zip(("forward", "step"), gains(layout, rows), strict=True):
            if gain < LEAST_GAIN:
                return f"no gain expected: {gain:.2f} times as fast in {phase} at {rows} rows"
    return None


def gains(layout: BlockLayout, rows: int) -> tuple[float, float]:
    """How many times as fast as a masked dense layer ours should be: forward, and step."""
    present = layout.num_weights
    size = layout.in_features * layout.out_features
    forward = layout.walked_density * size
    transposed, _ = layout.caches.derive("transposed", lambda: transposed_layout(layout))
    step = 2 * forward + transposed.walked_density * size
    edges = layout.in_features + layout.out_features
    moved = layout.in_features * (layout.col_order is not None)
    moved += layout.out_features * (layout.row_order is not None)

    def ratio(prices: tuple[DensePrices, OurPrices], walked: float, products: int) -> float:
        dense, ours = prices
        before = dense.call + rows * (dense.product * size + dense.copy * edges) + dense.mask * size
        after = (
            ours.call
            + ours.pack * present
            + rows
            * (
                ours.product * walked
                + ours.masked * (walked - products * present)
                + ours.copy * edges
                + ours.move * moved
            )
        )
        return before / after

    return ratio(FORWARD, forward, 1), ratio(STEP, step, 3)
