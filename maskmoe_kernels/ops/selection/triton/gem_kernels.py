"""The loss of one step of generalised EM, and its gradient (eq. 4, eq. 7).

::

    w  from the logits, as in selection_kernels, divided;  loss = sum of w_i BCE(y, f^i)
    grad_i = 2 w_i (f^i - y);  backward is one product with the gradient of the loss

Weights are divided before anything is multiplied by them: a factor that is applied later would be
infinite where their sum is denormal, and what it multiplies would have lost its digits before. A
sample's sum is that of a row, in registers; sums over the batch take a sweep of their own. A
program adds up its row tiles, torch the programs' sums: no atomics, an order that depends on the
shape alone.

::

    logits, mask          read once, or twice for sums over the batch
    target                read once
    grad                  written (through L2: 1 - g, then the gradient), float32
    partial               at most 2048 programs x (1 or H) float32
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskmoe_kernels.ops.selection.triton.confidence import (
    exp_negative,
    known_parts,
    log_one_plus,
    probabilities,
)
from maskmoe_kernels.ops.selection.triton.selection_kernels import (
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
from maskmoe_kernels.ops.triton_support.device import on

_WEIGHTINGS = ("selection", "deselection", "uniform")
_MASKS = ("none", "flags", "weights")
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
def weigh(
    logits, mask, scratch, subset_experts, supersets_of, has_superset, tile, rows, row_stride,
    expert_stride, experts, count, sharpness, CONFIDENCE: tl.constexpr, SHARP: tl.constexpr,
    WEIGHTING: tl.constexpr, MASK: tl.constexpr, R: tl.constexpr, HB: tl.constexpr,
):  # fmt: skip
    """Logits and undivided weights of a tile, and how much each row counts.

    WEIGHTING: "selection": weights are alpha; "deselection": the products alone; "uniform": 1.
    MASK: ``mask`` has a flag or a weight for each row, or there is none. A row that does not count
    is as if its logits were 0 and its weights too.
    """
    row, expert, tile_mask, at = place(tile, rows, experts, R, HB)
    times = (row < rows).to(tl.float32)
    if MASK != "none":
        times = tl.load(mask + row, mask=row < rows, other=0).to(tl.float32)
    counts = times != 0
    z = load_logits(logits, row, expert, tile_mask & counts, row_stride, expert_stride)
    weight = tl.full(z.shape, 1.0, tl.float32)
    if WEIGHTING != "uniform":
        is_sharpened = tl.load(has_superset + expert, mask=expert < experts, other=0) != 0
        g, rest = known_parts(z, is_sharpened, sharpness, CONFIDENCE, SHARP)
        weight = products(
            rest, scratch, row, at, tile_mask, rows, experts, subset_experts, supersets_of, count,
            HB,
        )  # fmt: skip
        if WEIGHTING == "selection":
            weight *= g
    return z, tl.where(tile_mask & counts, weight, 0.0), times


@triton.jit
def weight_sums(
    logits, mask, scratch, partial, subset_experts, supersets_of, has_superset, rows, row_stride,
    expert_stride, experts, count, sharpness, tiles, CONFIDENCE: tl.constexpr, SHARP: tl.constexpr,
    WEIGHTING: tl.constexpr, NORMALIZE: tl.constexpr, MASK: tl.constexpr, R: tl.constexpr, HB:
    tl.constexpr,
):  # fmt: skip
    """Per program the sums of w over its rows: of each expert, or of all."""
    total = tl.zeros((R, HB), tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _, weight, times = weigh(
            logits, mask, scratch, subset_experts, supersets_of, has_superset, tile, rows,
            row_stride, expert_stride, experts, count, sharpness, CONFIDENCE, SHARP, WEIGHTING,
            MASK, R, HB,
        )  # fmt: skip
        if MASK != "none":
            weight *= times
        total += weight
    if NORMALIZE == "expert":
        expert = tl.arange(0, HB)
        at = partial + tl.program_id(0).to(tl.int64) * experts + expert
        tl.store(at, tl.sum(total, 0), mask=expert < experts)
    else:
        tl.store(partial + tl.program_id(0), tl.sum(tl.sum(total, 1), 0))


@triton.jit
def gem(
    logits, target, mask, grad, partial, divisor, subset_experts, supersets_of, has_superset, rows,
    row_stride, expert_stride, experts, count, sharpness, tiles, CONFIDENCE: tl.constexpr, SHARP:
    tl.constexpr, WEIGHTING: tl.constexpr, NORMALIZE: tl.constexpr, MASK: tl.constexpr, R:
    tl.constexpr, HB: tl.constexpr,
):  # fmt: skip
    """Gradient, and per program the sum of w BCE, w divided by ``divisor``: (H,) or (1,)."""
    loss_sum = tl.zeros((R, HB), tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        z, weight, times = weigh(
            logits, mask, grad, subset_experts, supersets_of, has_superset, tile, rows, row_stride,
            expert_stride, experts, count, sharpness, CONFIDENCE, SHARP, WEIGHTING, MASK, R, HB,
        )  # fmt: skip
        row, expert, tile_mask, at = place(tile, rows, experts, R, HB)
        if NORMALIZE == "sample":
            total = tl.sum(weight, 1)[:, None]
            weight /= tl.where(total == 0, 1.0, total)
        if MASK != "none":
            weight *= times
        if NORMALIZE == "expert":
            weight /= tl.load(divisor + expert, mask=expert < experts, other=1.0)
        else:
            weight /= tl.load(divisor)
        y = tl.load(target + row, mask=times != 0, other=0.0)
        loss, error = cross_entropy(z, y)
        tl.store(grad + at, 2 * weight * error, mask=tile_mask)
        loss_sum += weight * loss
    tl.store(partial + tl.program_id(0), tl.sum(tl.sum(loss_sum, 1), 0))


def gem_loss(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    subset_experts: Tensor,
    supersets_of: Tensor,
    has_superset: Tensor,
    confidence: str,
    sharpness: float,
    weighting: str,
    normalize: str,
) -> tuple[Tensor, Tensor]:
    """Loss ``()`` and its gradient ``(*, H)``, float32.

    ``normalize`` is ``"none"``, ``"sample"``, ``"expert"`` or ``"batch"``. With ``sample_weight``,
    rows count that much, and ``mask`` only says how many do.
    """
    z, tile = rows_of(logits), tile_of(logits.shape[-1])
    rows, experts = z.shape
    tiles = triton.cdiv(rows, tile.rows)
    programs = min(tiles, _PROGRAMS)
    grad = logits.new_empty(logits.shape, dtype=torch.float32)
    if not rows:
        return grad.new_zeros(()), grad
    y = target.reshape(-1).float()
    times = mask if sample_weight is None else sample_weight
    times = None if times is None else times.reshape(-1).contiguous()
    kept = y if times is None else times
    kind = "none" if times is None else "flags" if sample_weight is None else "weights"
    tables = (
        subset_experts,
        supersets_of,
        has_superset,
        rows,
        *z.stride(),
        experts,
        len(subset_experts),
        float(sharpness),
    )
    options = {
        "CONFIDENCE": confidence, "SHARP": sharpness != 1, "WEIGHTING": weighting,
        "NORMALIZE": normalize, "MASK": kind, "R": tile.rows, "HB": tile.experts,
        "num_warps": tile.warps, "num_stages": 1,
    }  # fmt: skip
    with on(z.device):
        if normalize in ("expert", "batch"):
            partial = grad.new_empty(programs, experts if normalize == "expert" else 1)
            weight_sums[(programs,)](z, kept, grad, partial, *tables, tiles, **options)
            total = partial.sum(0)
            divisor = total.masked_fill(total == 0, 1)
        elif mask is None:
            divisor = grad.new_full((1,), rows)
        else:
            divisor = mask.sum().clamp(min=1).float()
        partial = grad.new_empty(programs)
        gem[(programs,)](z, y, kept, grad, partial, divisor, *tables, tiles, **options)
    return partial.sum(), grad


def variants(every: bool = False) -> Iterator[Variant]:
    """What ``gem_loss`` can launch; ``every`` as in ``selection_kernels.variants``."""
    for kernel, normalizes in (
        (gem, ("none", "sample", "expert", "batch")),
        (weight_sums, ("expert", "batch")),
    ):
        switches = [
            (dtype, {"SHARP": sharp, "WEIGHTING": weighting, "NORMALIZE": of, "MASK": mask})
            for dtype, sharp, weighting, mask, of in itertools.product(
                POINTERS, (False, True), _WEIGHTINGS, _MASKS, normalizes
            )
        ]
        types = {
            "subset_experts": "*i32",
            "supersets_of": "*u8",
            "has_superset": "*i1",
            "sharpness": "fp32",
        }
        types |= dict.fromkeys(("rows", "row_stride", "experts", "count", "tiles"), "i32")
        for dtype, constexprs, tile in combinations_of(switches, every):
            mask = {"mask": "*i1" if constexprs["MASK"] == "flags" else "*fp32"}
            yield variant(kernel, {**types, **mask, "logits": POINTERS[dtype]}, constexprs, tile)
