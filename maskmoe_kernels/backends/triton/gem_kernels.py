"""The loss of one step of generalised EM: one kernel, loss and gradient (eq. 4, eq. 7).

::

    w  from the logits, as in selection_kernels;  loss = sum of w_i BCE(y, f^i) times a scale
    grad_i = 2 w_i (f^i - y), and the scale stays apart: backward is one product

Weights divided by a sample's sum are divided here, the row being in registers. Sums over the batch
are known at the end only, and enter as the scale: one number, or one per expert. A program adds up
its row tiles, torch the programs' sums: no atomics, an order that depends on the shape alone.

::

    logits, target, mask  read once
    grad                  written (through L2: 1 - g, then the gradient), float32
    partial               at most 2048 programs x 2 x (1 or H) float32
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskmoe_kernels.backends.triton.confidence import (
    exp_negative,
    known_parts,
    log_one_plus,
    probabilities,
)
from maskmoe_kernels.backends.triton.device import on
from maskmoe_kernels.backends.triton.selection_kernels import (
    POINTERS,
    Variant,
    combinations_of,
    load_logits,
    place,
    products,
    rows_of,
    tile_of,
    variant,
)

# Enough to fill any GPU; also the most sums that are left to torch.
_PROGRAMS = 2048


@triton.jit
def cross_entropy(z, y):
    """BCE(y, f) and f - y with f = sigmoid(2z), as torch has it for infinite and NaN logits too."""
    e = exp_negative(-2 * tl.abs(z))
    p, rest_p = probabilities(z, e)
    loss = (1 - y) * (2 * z) - (2 * tl.where(z > 0, 0.0, z) - log_one_plus(e))
    # f (1 - y) - (1 - f) y = f - y, without the cancellation of a confident expert that is right.
    error = p * (1 - y) - rest_p * y
    return loss, tl.where(z == z, error, z)


@triton.jit
def gem(
    logits, target, mask, grad, partial, smaller, above, larger, rows, row_stride, expert_stride,
    experts, count, sharpness, tiles, CONFIDENCE: tl.constexpr, SHARP: tl.constexpr,
    OWN: tl.constexpr, NORMALIZE: tl.constexpr, MASKED: tl.constexpr, R: tl.constexpr,
    HB: tl.constexpr,
):  # fmt: skip
    """Unscaled gradient, and per program the sums of w BCE and (if they divide) of w.

    OWN: weights are alpha, else the products alone. A masked row is as if its logits were 0 and
    its weights too.
    """
    loss_sum = tl.zeros((R, HB), tl.float32)
    weight_sum = tl.zeros((R, HB), tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, expert, live, at = place(tile, rows, experts, R, HB)
        counts = row < rows
        if MASKED:
            counts = tl.load(mask + row, mask=counts, other=0) != 0
        z = load_logits(logits, row, expert, live & counts, row_stride, expert_stride)
        y = tl.load(target + row, mask=counts, other=0.0)
        is_smaller = tl.load(larger + expert, mask=expert < experts, other=0) != 0
        g, rest = known_parts(z, is_smaller, sharpness, CONFIDENCE, SHARP)
        weight = products(rest, grad, row, at, live, rows, experts, smaller, above, count, HB)
        if OWN:
            weight *= g
        weight = tl.where(live & counts, weight, 0.0)
        if NORMALIZE == "sample":
            total = tl.sum(weight, 1)[:, None]
            weight /= tl.where(total == 0, 1.0, total)
        loss, error = cross_entropy(z, y)
        tl.store(grad + at, 2 * weight * error, mask=live)
        loss_sum += weight * loss
        if NORMALIZE == "expert" or NORMALIZE == "batch":
            weight_sum += weight
    if NORMALIZE == "expert":
        expert = tl.arange(0, HB)
        at = partial + tl.program_id(0).to(tl.int64) * 2 * experts + expert
        tl.store(at, tl.sum(loss_sum, 0), mask=expert < experts)
        tl.store(at + experts, tl.sum(weight_sum, 0), mask=expert < experts)
    else:
        at = partial + tl.program_id(0) * 2
        tl.store(at, tl.sum(tl.sum(loss_sum, 1), 0))
        tl.store(at + 1, tl.sum(tl.sum(weight_sum, 1), 0))


def gem_loss(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    smaller: Tensor,
    above: Tensor,
    larger: Tensor,
    confidence: str,
    sharpness: float,
    weighting: str,
    normalize: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss ``()``, unscaled gradient ``(*, H)`` and its scale, ``(H,)`` or ``(1,)``; float32.

    ``normalize`` is ``"none"``, ``"sample"``, ``"expert"`` or ``"batch"``.
    """
    z, tile = rows_of(logits), tile_of(logits.shape[-1])
    rows, experts = z.shape
    tiles = triton.cdiv(rows, tile.rows)
    programs = min(tiles, _PROGRAMS)
    grad = logits.new_empty(logits.shape, dtype=torch.float32)
    partial = grad.new_empty(programs, 2, experts if normalize == "expert" else 1)
    if rows:
        y = target.reshape(-1).float()
        kept = y if mask is None else mask.reshape(-1)
        with on(z.device):
            gem[(programs,)](
                z, y, kept, grad, partial, smaller, above, larger, rows, *z.stride(), experts,
                len(smaller), float(sharpness), tiles, CONFIDENCE=confidence, SHARP=sharpness != 1,
                OWN=weighting == "selection", NORMALIZE=normalize, MASKED=mask is not None,
                R=tile.rows, HB=tile.experts, num_warps=tile.warps, num_stages=1,
            )  # fmt: skip
    loss, weight = partial.sum(0)
    if normalize in ("expert", "batch"):
        scale = weight.masked_fill(weight == 0, 1).reciprocal()
    elif mask is None:
        scale = torch.full_like(loss, 1 / max(rows, 1))
    else:
        scale = mask.sum().clamp(min=1).reciprocal().reshape(1)
    return (loss * scale).sum(), grad, scale


def variants(every: bool = False) -> Iterator[Variant]:
    """What ``gem_loss`` can launch; ``every`` as in ``selection_kernels.variants``."""
    normalizes = ("none", "sample", "expert", "batch")
    switches = [
        (dtype, {"SHARP": sharp, "OWN": own, "NORMALIZE": normalize, "MASKED": masked})
        for dtype, sharp, own, masked, normalize in itertools.product(
            POINTERS, (False, True), (True, False), (False, True), normalizes
        )
    ]
    types = {"smaller": "*i32", "above": "*u8", "larger": "*i1", "sharpness": "fp32"}
    types |= dict.fromkeys(("rows", "row_stride", "experts", "count", "tiles"), "i32")
    for dtype, constexprs, tile in combinations_of(switches, every):
        mask = {"mask": "*i1" if constexprs["MASKED"] else "*fp32"}
        yield variant(gem, {**types, **mask, "logits": POINTERS[dtype]}, constexprs, tile)
