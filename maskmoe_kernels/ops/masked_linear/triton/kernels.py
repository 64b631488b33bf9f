"""The masked linear map on tiles: forward, backward, and the reductions of partial sums.

::

    forward   y[r, u] = act(b[u] + sum over chunks of x[r, features] W[features, u])
    backward  grad_z  = grad_y * act'(saved), formed wherever it is read, or once by ``form``
              grad_x  = the same product over the transposed layout: routed blocks only
              grad_W[f, u] = sum over rows of x[r, f] grad_z[r, u], in split-K chunks of rows
    pack          puts weights into the order of the tiles; ``transpose`` matrices by columns
    total         adds up the split-K chunks, in a fixed order
    reduce_parts  adds up the parts of split tiles, in theirs

A program owns what it writes and no sum depends on timing: the same bits every time, no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from maskmoe_kernels.ops.masked_linear.triton.activations import grad_before
from maskmoe_kernels.ops.masked_linear.triton.tile_products import (
    dot,
    epilogue,
    load,
    load_transposed,
    part,
    units_of,
)


@triton.jit
def pack(weight, packed, index, size, SIZE: tl.constexpr):
    """The weights in the order of the tiles; 0 where ``index`` is negative."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    place = tl.load(index + at, mask=at < size, other=-1)
    tl.store(packed + at, tl.load(weight + place, mask=place >= 0, other=0.0), mask=at < size)


@triton.jit
def forward(
    x, weight, packed, bias, y, z, partial, described, described_weights,
    parts, tiles, units, features, packed_features, bases, strides,
    num_rows, x_stride, out_features, num_parts,
    ACT: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr, SPLIT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, SHARED: tl.constexpr,
    PACKED: tl.constexpr, TMA: tl.constexpr, FEATURE_GRAIN: tl.constexpr,
    PACKED_GRAIN: tl.constexpr, UNIT_GRAIN: tl.constexpr, WEIGHT_GRAIN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output, and z where KEEP, for M rows and PARTS parts.

    Programs of the same rows are neighbours, so that x comes from memory once and then from the
    L2 cache; within a program, parts find it in the L1 cache.
    """
    groups = tl.cdiv(num_parts, PARTS)
    first_row = tl.program_id(0) // groups * M
    rows = first_row.to(tl.int64) + tl.arange(0, M)
    row_mask = rows < num_rows
    start = tl.program_id(0) % groups * PARTS
    for k in range(start, tl.minimum(start + PARTS, num_parts)):
        part(
            tl.load(parts + k * 4), tl.load(parts + k * 4 + 1), tl.load(parts + k * 4 + 2),
            tl.load(parts + k * 4 + 3), first_row, rows, row_mask, num_rows, x, x, x_stride, weight,
            packed, described, described_weights, tiles, units, features, packed_features, bases,
            strides, bias, y, z, partial, out_features, "none", ACT, BIAS, KEEP, SPLIT, M, N, K,
            SHARED, PACKED, TMA, FEATURE_GRAIN, PACKED_GRAIN, UNIT_GRAIN, WEIGHT_GRAIN, PRECISION,
        )  # fmt: skip


@triton.jit
def reduce_parts(
    partial, bias, y, z, splits, units, num_rows, out_features,
    ACT: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, UNIT_GRAIN: tl.constexpr,
):  # fmt: skip
    """Output of M rows of one split tile from the sums of its parts, in their order."""
    split = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    row_mask = rows < num_rows
    lane = tl.arange(0, N)
    tile = tl.load(splits + split * 3)
    unit = units_of(units, tile, lane, UNIT_GRAIN, N)
    acc = tl.zeros((M, N), tl.float32)
    first = tl.load(splits + split * 3 + 1)
    at = (first.to(tl.int64) * num_rows + rows)[:, None] * N + lane[None, :]
    for _ in range(first, tl.load(splits + split * 3 + 2)):
        acc += tl.load(partial + at, mask=row_mask[:, None], other=0.0)
        at += tl.full((), N, tl.int64) * num_rows
    epilogue(acc, rows, row_mask[:, None], unit, bias, y, z, out_features, ACT, BIAS, KEEP)


@triton.jit
def _grad_weight(
    item, split_k, first_row, last_row, x, grad_y, saved, x_stride, weight_sums, bias_sums, items,
    tiles, units, features, bases, strides, num_weights, out_features,
    ACT: tl.constexpr, R: tl.constexpr, F: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    SHARED: tl.constexpr, BIAS: tl.constexpr, FEATURE_GRAIN: tl.constexpr, UNIT_GRAIN: tl.constexpr,
    WEIGHT_GRAIN: tl.constexpr, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """F features x lanes of grad_W over a split-K chunk of rows; the first item sums the bias.

    TRANSPOSED: x and grad_y are ``(features, x_stride)`` and ``(units, x_stride)``.
    """
    lane = tl.arange(0, N)
    tile = tl.load(items + item * 4)
    at = tl.load(items + item * 4 + 1)
    end = tl.load(items + item * 4 + 2)
    is_first = tl.load(items + item * 4 + 3)
    entry = at + tl.arange(0, F)
    feature = tl.load(features + entry, mask=entry < end, other=-1)
    feature = tl.max_contiguous(tl.multiple_of(feature, FEATURE_GRAIN), FEATURE_GRAIN)
    unit = units_of(units, tile, lane, UNIT_GRAIN, N)
    acc = tl.zeros((F, N), tl.float32)
    # Summed over its rows at the end, across threads.
    bias = tl.zeros((N, R) if TRANSPOSED else (R, N), tl.float32)
    for row in range(first_row, last_row, R):
        rows = row + tl.arange(0, R).to(tl.int64)
        row_mask = rows < last_row
        if TRANSPOSED:
            a = load_transposed(x, feature, rows, row_mask, x_stride)
            b = load_transposed(grad_y, unit, rows, row_mask, x_stride)
            acc = dot(a, tl.trans(b), acc, PRECISION)
        else:
            a = load(x, x, rows, row_mask, feature, x_stride, "none")
            b = load(grad_y, saved, rows, row_mask, unit, out_features, ACT)
            acc = dot(tl.trans(a), b, acc, PRECISION)
        if BIAS:
            if is_first == 1:
                bias += b.to(tl.float32)
    weight_sums += split_k.to(tl.int64) * num_weights
    if SHARED:
        at_chunk = bases + (entry // K)[:, None] * N + lane[None, :]
        base = tl.load(at_chunk, mask=(entry < end)[:, None] & (lane >= 0)[None, :], other=-1)
        base = tl.max_contiguous(tl.multiple_of(base, [1, WEIGHT_GRAIN]), [1, WEIGHT_GRAIN])
        step = tl.load(strides + tile * N + lane)
        step = tl.max_constancy(tl.multiple_of(step, WEIGHT_GRAIN), WEIGHT_GRAIN)
        place = base + (entry % K)[:, None] * step[None, :]
        mask = (feature >= 0)[:, None] & (base >= 0)
    else:
        base = tl.multiple_of(tl.load(tiles + tile * 4), WEIGHT_GRAIN)
        width = tl.multiple_of(tl.load(tiles + tile * 4 + 1), WEIGHT_GRAIN)
        entry -= tl.load(tiles + tile * 4 + 2) * K
        place = base + entry[:, None] * width + lane[None, :]
        mask = (feature >= 0)[:, None] & (unit >= 0)[None, :]
    tl.store(weight_sums + place, acc.to(weight_sums.dtype.element_ty), mask=mask)
    if BIAS:
        if is_first == 1:
            bias_sums += split_k.to(tl.int64) * out_features
            total = tl.sum(bias, 1 if TRANSPOSED else 0).to(bias_sums.dtype.element_ty)
            tl.store(bias_sums + unit, total, mask=unit >= 0)


@triton.jit
def transpose(matrix, transposed, num_rows, columns, stride, row_stride, SIZE: tl.constexpr):
    """SIZE rows x SIZE columns of ``matrix``, column after column, ``row_stride`` apart."""
    rows = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    at = rows[:, None] * stride + column[None, :]
    value = tl.load(matrix + at, mask=(rows < num_rows)[:, None] & (column < columns)[None, :])
    at = column.to(tl.int64)[:, None] * row_stride + rows[None, :]
    mask = (column < columns)[:, None] & (rows < num_rows)[None, :]
    tl.store(transposed + at, tl.trans(value), mask=mask)


@triton.jit
def form(grad_y, saved, grad_z, size, ACT: tl.constexpr, SIZE: tl.constexpr):
    """grad_z, once for all who read it."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    grad = tl.load(grad_y + at, mask=at < size, other=0.0).to(tl.float32)
    kept = tl.load(saved + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(grad_z + at, grad_before(grad, kept, ACT).to(grad_z.dtype.element_ty), mask=at < size)


@triton.jit
def backward(
    grad_y, saved, x, transposed_weight, packed, grad_x, weight_sums, bias_sums,
    described, described_weights,
    items, tiles, units, features, bases, strides,
    x_parts, x_tiles, x_units, x_features, packed_features, x_bases, x_strides,
    num_rows, split_k_rows, x_stride, in_features, out_features, num_weights, num_items, num_parts,
    ACT: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    R: tl.constexpr, F: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr,
    FEATURE_GRAIN: tl.constexpr, UNIT_GRAIN: tl.constexpr, WEIGHT_GRAIN: tl.constexpr,
    XM: tl.constexpr, XN: tl.constexpr, XK: tl.constexpr, XPARTS: tl.constexpr,
    XSHARED: tl.constexpr, XPACKED: tl.constexpr, TMA: tl.constexpr, XFEATURE_GRAIN: tl.constexpr,
    PACKED_GRAIN: tl.constexpr, XUNIT_GRAIN: tl.constexpr, XWEIGHT_GRAIN: tl.constexpr,
    TRANSPOSED: tl.constexpr, OF_W: tl.constexpr, OF_X: tl.constexpr,
):  # fmt: skip
    """The gradients of the weights (OF_W) and of x (OF_X), by split-K chunks of rows.

    The programs of such a chunk are neighbours: its items of grad_W, each over all of its rows,
    then its tiles of grad_x. So x, grad_y and saved come from memory once, then from the L2 cache.
    """
    groups = tl.cdiv(num_parts, XPARTS)
    programs = num_items + tl.cdiv(split_k_rows, XM) * groups
    split_k = tl.program_id(0) // programs
    local = tl.program_id(0) % programs
    first_row = split_k * split_k_rows
    last_row = tl.minimum(first_row + split_k_rows, num_rows)
    of_w = OF_W  # constants: what is not asked for is not compiled
    if OF_W and OF_X:
        of_w = local < num_items
    if of_w:
        if OF_W:
            _grad_weight(
                local, split_k, first_row, last_row, x, grad_y, saved, x_stride, weight_sums,
                bias_sums, items, tiles, units, features, bases, strides, num_weights, out_features,
                ACT, R, F, N, K, SHARED, BIAS, FEATURE_GRAIN, UNIT_GRAIN, WEIGHT_GRAIN, PRECISION,
                TRANSPOSED,
            )  # fmt: skip
    else:
        if OF_X:
            local -= num_items
            tile_row = first_row + local // groups * XM
            rows = tile_row.to(tl.int64) + tl.arange(0, XM)
            row_mask = rows < last_row
            start = local % groups * XPARTS
            for k in range(start, tl.minimum(start + XPARTS, num_parts)):
                part(
                    tl.load(x_parts + k * 4), tl.load(x_parts + k * 4 + 1),
                    tl.load(x_parts + k * 4 + 2), -1, tile_row, rows, row_mask, num_rows, grad_y,
                    saved, out_features, transposed_weight, packed, described, described_weights,
                    x_tiles, x_units, x_features, packed_features, x_bases, x_strides, grad_x,
                    grad_x, grad_x, grad_x, in_features, ACT, "none", False, False, False, XM, XN,
                    XK, XSHARED, XPACKED, TMA, XFEATURE_GRAIN, PACKED_GRAIN, XUNIT_GRAIN,
                    XWEIGHT_GRAIN, PRECISION,
                )  # fmt: skip


@triton.jit
def total(
    weight_sums, bias_sums, grad_weight, grad_bias, num_weights, out_features, num_split_k,
    BIAS: tl.constexpr, SIZE: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """SIZE entries of grad_W and grad_b from the sums of the split-K chunks."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    weights = at < num_weights
    acc = _total(weight_sums, at, weights, num_weights, num_split_k, SIZE, TOGETHER)
    tl.store(grad_weight + at, acc.to(grad_weight.dtype.element_ty), mask=weights)
    if BIAS:
        unit = at - num_weights
        units = (unit >= 0) & (unit < out_features)
        acc = _total(bias_sums, unit, units, out_features, num_split_k, SIZE, TOGETHER)
        tl.store(grad_bias + unit, acc.to(grad_bias.dtype.element_ty), mask=units)


@triton.jit
def _total(sums, at, mask, stride, num_split_k, SIZE: tl.constexpr, TOGETHER: tl.constexpr):
    """Over all chunks; TOGETHER of them are loaded before the first is added."""
    acc = tl.zeros((SIZE,), tl.float32)
    for first in range(0, num_split_k, TOGETHER):
        chunk = first + tl.arange(0, TOGETHER)
        place = chunk.to(tl.int64)[:, None] * stride + at[None, :]
        known = (chunk < num_split_k)[:, None] & mask[None, :]
        acc += tl.sum(tl.load(sums + place, mask=known, other=0.0), 0)
    return acc
