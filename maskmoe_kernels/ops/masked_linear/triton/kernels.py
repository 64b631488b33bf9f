"""The masked linear map on tiles: forward, backward, and the reductions of partial sums.

::

    forward   y[r, u] = act(b[u] + sum over chunks of x[r, features] W[features, u])
    backward  grad_z  = grad_y * act'(saved), formed wherever it is read, or once by ``form``
              grad_x  = the same product over the transposed layout: routed blocks only
              grad_W[f, u] = sum over rows of x[r, f] grad_z[r, u], in split-K chunks of rows
    total         adds up the split-K chunks, in their order
    reduce_parts  adds up the parts of split tiles, in theirs

A program owns what it writes and no sum depends on timing: the same bits every time, no atomics.
What a lane may not see is either in none of its chunks, or (in shared tiles) multiplied by 0, and
rows for which that is not enough, with NaN or infinity in them, are done again (:func:`_part`).
Padding is loaded as 0 on both sides of the product, so that no NaN beside the tile enters it.

Where PACKED, ``pack`` has put the weights into the order of the tiles first: for each chunk a
matrix of lanes x features, 0 where a lane does not see a feature. A step of the loop then loads
neighbouring weights from neighbouring addresses, and features are the inner dimension, as the
tensor cores want it for 32 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from maskmoe_kernels.ops.masked_linear.triton.activations import activate, grad_before


@triton.jit
def _load(matrix, saved, rows, row_mask, columns, stride, ACT: tl.constexpr):
    """Rows x columns of a matrix; times act'(saved) if there is an activation. Padding is 0."""
    mask = row_mask[:, None] & (columns >= 0)[None, :]
    at = rows[:, None] * stride + columns[None, :]
    value = tl.load(matrix + at, mask=mask, other=0.0)
    if ACT != "none":
        kept = tl.load(saved + at, mask=mask, other=0.0)
        value = grad_before(value.to(tl.float32), kept.to(tl.float32), ACT).to(value.dtype)
    return value


@triton.jit
def _load_transposed(matrix, columns, rows, row_mask, stride):
    """Columns x rows of a matrix that lies column after column, ``stride`` apart. Padding is 0."""
    at = columns.to(tl.int64)[:, None] * stride + rows[None, :]
    return tl.load(matrix + at, mask=(columns >= 0)[:, None] & row_mask[None, :], other=0.0)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == "exact":  # the interpreter's bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _features(features, chunk, last, GRAIN: tl.constexpr, K: tl.constexpr):
    """The features of a chunk; from the last one on, none."""
    at = chunk * K + tl.arange(0, K)
    feature = tl.load(features + at, mask=at < last * K, other=-1)
    return tl.max_contiguous(tl.multiple_of(feature, GRAIN), GRAIN)


@triton.jit
def _bases(
    bases, lane, chunk, last,
    GRAIN: tl.constexpr, N: tl.constexpr, W: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Where each lane's weights for a chunk start; -1: the lane does not see it."""
    base = tl.full((W,), -1, tl.int32)
    if SHARED:
        at = chunk * N + lane
        base = tl.load(bases + at, mask=at < last * N, other=-1)
        base = tl.max_contiguous(tl.multiple_of(base, GRAIN), GRAIN)
    return base


@triton.jit
def _multiply(
    tile, chunk, last, rows, row_mask, unit, first_lane, x, saved, x_stride, weight, tiles,
    features, bases, strides, ACT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    W: tl.constexpr, SHARED: tl.constexpr, GRAIN: tl.constexpr, WEIGHT_GRAIN: tl.constexpr,
    PRECISION: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """Chunks [chunk, last) of a tile: rows x lanes, float32; and which rows were cleaned.

    HOW: "plain" multiplies every value as it is. "clean" replaces values that are not finite by 0;
    where all are finite, it has the bits of "plain". "select" adds to a lane only the chunks that
    it sees. The last two are for :func:`_repair`.
    """
    lane = first_lane + tl.arange(0, W)
    depth = tl.arange(0, K)
    acc = tl.zeros((M, W), tl.float32)
    cleaned = tl.zeros((M, K), tl.int32)  # summed up at the end: not in the loop, across threads
    base = tl.multiple_of(tl.load(tiles + tile * 4), WEIGHT_GRAIN)
    width = tl.multiple_of(tl.load(tiles + tile * 4 + 1), WEIGHT_GRAIN)
    first = tl.load(tiles + tile * 4 + 2)
    lane_stride = tl.zeros((W,), tl.int32)
    if SHARED:
        lane_stride = tl.load(strides + tile * N + lane)
        lane_stride = tl.max_constancy(tl.multiple_of(lane_stride, WEIGHT_GRAIN), WEIGHT_GRAIN)
    # The tables of the next chunk are loaded one step ahead: no load of x or weights waits for a
    # table, and all of them can be in flight.
    feature = _features(features, chunk, last, GRAIN, K)
    lane_base = _bases(bases, lane, chunk, last, WEIGHT_GRAIN, N, W, SHARED)
    # Loads in flight take registers. A repair is rare, so it has none in flight.
    for c in tl.range(chunk, last, num_stages=None if HOW == "plain" else 1):
        a = _load(x, saved, rows, row_mask, feature, x_stride, ACT)
        if HOW == "clean":
            finite = tl.abs(a.to(tl.float32)) < float("inf")
            cleaned = tl.maximum(cleaned, 1 - finite.to(tl.int32))
            a = tl.where(finite, a, 0.0).to(a.dtype)
        if SHARED:
            sees = lane_base >= 0
            at = lane_base[None, :] + depth[:, None] * lane_stride[None, :]
            b = tl.load(weight + at, mask=(feature >= 0)[:, None] & sees[None, :], other=0.0)
            if HOW == "select":
                product = _dot(a, b, tl.zeros((M, W), tl.float32), PRECISION)
                acc += tl.where(sees[None, :], product, 0.0)
            else:
                acc = _dot(a, b, acc, PRECISION)
        else:
            at = base + ((c - first) * K + depth)[:, None] * width + lane[None, :]
            b = tl.load(weight + at, mask=(feature >= 0)[:, None] & (unit >= 0)[None, :], other=0.0)
            acc = _dot(a, b, acc, PRECISION)
        feature = _features(features, c + 1, last, GRAIN, K)
        lane_base = _bases(bases, lane, c + 1, last, WEIGHT_GRAIN, N, W, SHARED)
    return acc, tl.max(cleaned, 1)


@triton.jit
def pack(weight, packed, index, size, SIZE: tl.constexpr):
    """The weights in the order of the tiles; 0 where ``index`` is negative."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    place = tl.load(index + at, mask=at < size, other=-1)
    tl.store(packed + at, tl.load(weight + place, mask=place >= 0, other=0.0), mask=at < size)


@triton.jit
def _multiply_packed(
    chunk, last, rows, row_mask, x, saved, x_stride, packed, features,
    ACT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GRAIN: tl.constexpr,
    PRECISION: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """As :func:`_multiply`, "plain" or "clean", with the weights that ``pack`` has put in order."""
    acc = tl.zeros((M, N), tl.float32)
    cleaned = tl.zeros((M, K), tl.int32)
    at = tl.arange(0, N)[:, None] * K + tl.arange(0, K)[None, :]
    weights = packed + chunk * (N * K) + at
    feature = _features(features, chunk, last, GRAIN, K)
    for c in tl.range(chunk, last, num_stages=None if HOW == "plain" else 1):
        a = _load(x, saved, rows, row_mask, feature, x_stride, ACT)
        if HOW == "clean":
            finite = tl.abs(a.to(tl.float32)) < float("inf")
            cleaned = tl.maximum(cleaned, 1 - finite.to(tl.int32))
            a = tl.where(finite, a, 0.0).to(a.dtype)
        b = tl.load(weights)
        acc = _dot(a, tl.trans(b), acc, PRECISION)
        weights += N * K
        feature = _features(features, c + 1, last, GRAIN, K)
    return acc, tl.max(cleaned, 1)


@triton.jit
def _put(
    acc, rows, mask, unit, lane, slot, num_rows, bias, y, z, partial, out_features,
    ACT: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr, SPLIT: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Sums of a tile's part into the workspace, or of a whole tile to the output."""
    whole = True
    if SPLIT:
        whole = slot < 0
        if slot >= 0:
            at = (slot.to(tl.int64) * num_rows + rows)[:, None] * N + lane[None, :]
            tl.store(partial + at, acc, mask=mask)
    if whole:
        _epilogue(acc, rows, mask, unit, bias, y, z, out_features, ACT, BIAS, KEEP)


@triton.jit
def _epilogue(
    acc, rows, mask, unit, bias, y, z, out_features,
    ACT: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Bias, activation, and the store of each output."""
    if BIAS:
        acc += tl.load(bias + unit, mask=unit >= 0, other=0.0).to(tl.float32)[None, :]
    mask = mask & (unit >= 0)[None, :]
    at = rows[:, None] * out_features + unit[None, :]
    if KEEP:
        tl.store(z + at, acc.to(z.dtype.element_ty), mask=mask)
    tl.store(y + at, activate(acc, ACT).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _units(units, tile, lane, GRAIN: tl.constexpr, N: tl.constexpr):
    unit = tl.load(units + tile * N + lane)
    return tl.max_contiguous(tl.multiple_of(unit, GRAIN), GRAIN)


@triton.jit
def _part(
    tile, chunk, last, slot, rows, row_mask, num_rows, x, saved, x_stride, weight, packed, tiles,
    units, features, packed_features, bases, strides, bias, y, z, partial, out_features,
    IN_ACT: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr,
    SPLIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr,
    PACKED: tl.constexpr, FEATURE_GRAIN: tl.constexpr, PACKED_GRAIN: tl.constexpr,
    UNIT_GRAIN: tl.constexpr, WEIGHT_GRAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Multiplies and stores a part of a tile.

    In a shared tile a lane multiplies what it does not see by 0. That adds nothing, unless the
    value is not finite: then the lane's sum is not finite either, which is seen here, and rows
    with such values are done again, so that no lane's bits depend on what it does not see.
    """
    lane = tl.arange(0, N)
    unit = _units(units, tile, lane, UNIT_GRAIN, N)
    if PACKED:
        acc, _ = _multiply_packed(
            chunk, last, rows, row_mask, x, saved, x_stride, packed, packed_features, IN_ACT, M, N,
            K, PACKED_GRAIN, PRECISION, "plain",
        )  # fmt: skip
    else:
        acc, _ = _multiply(
            tile, chunk, last, rows, row_mask, unit, 0, x, saved, x_stride, weight, tiles,
            features, bases, strides, IN_ACT, M, N, K, N, SHARED, FEATURE_GRAIN, WEIGHT_GRAIN,
            PRECISION, "plain",
        )  # fmt: skip
    _put(
        acc, rows, row_mask[:, None], unit, lane, slot, num_rows, bias, y, z, partial,
        out_features, ACT, BIAS, KEEP, SPLIT, N,
    )  # fmt: skip
    if SHARED:
        finite = (tl.abs(acc) < float("inf")).to(tl.int32)
        if tl.min(finite, None) == 0:
            _repair(
                tile, chunk, last, slot, rows, row_mask, num_rows, x, saved, x_stride, weight,
                packed, tiles, units, features, packed_features, bases, strides, bias, y, z,
                partial, out_features, IN_ACT, ACT, BIAS, KEEP, SPLIT, M, N, K, PACKED,
                FEATURE_GRAIN, PACKED_GRAIN, UNIT_GRAIN, WEIGHT_GRAIN, PRECISION,
            )  # fmt: skip


@triton.jit
def _repair(
    tile, chunk, last, slot, rows, row_mask, num_rows, x, saved, x_stride, weight, packed, tiles,
    units, features, packed_features, bases, strides, bias, y, z, partial, out_features,
    IN_ACT: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr,
    SPLIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PACKED: tl.constexpr,
    FEATURE_GRAIN: tl.constexpr, PACKED_GRAIN: tl.constexpr, UNIT_GRAIN: tl.constexpr,
    WEIGHT_GRAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The rows that hold values that are not finite, once more.

    First without these values, which is right for the lanes that do not see them; then, for the
    others, with them. A few lanes at a time: this must not take more registers than the rest.
    """
    W: tl.constexpr = min(N, 32)
    lane = tl.arange(0, N)
    if PACKED:
        acc, cleaned = _multiply_packed(
            chunk, last, rows, row_mask, x, saved, x_stride, packed, packed_features, IN_ACT, M, N,
            K, PACKED_GRAIN, PRECISION, "clean",
        )  # fmt: skip
        chunk = tl.load(tiles + tile * 4 + 2)  # of the tables that are not packed, for the others
        last = tl.load(tiles + tile * 4 + 3)
    else:
        acc, cleaned = _multiply(
            tile, chunk, last, rows, row_mask, _units(units, tile, lane, UNIT_GRAIN, N), 0, x,
            saved, x_stride, weight, tiles, features, bases, strides, IN_ACT, M, N, K, N, True,
            FEATURE_GRAIN, WEIGHT_GRAIN, PRECISION, "clean",
        )  # fmt: skip
    dirty = (row_mask & (cleaned > 0))[:, None]
    tl.debug_barrier()  # other threads may have stored what is stored again here
    _put(
        acc, rows, dirty, _units(units, tile, lane, UNIT_GRAIN, N), lane, slot, num_rows, bias, y,
        z, partial, out_features, ACT, BIAS, KEEP, SPLIT, N,
    )  # fmt: skip
    tl.debug_barrier()
    for first_lane in range(0, N, W):
        few = first_lane + tl.arange(0, W)
        unit = _units(units, tile, few, 1, N)
        some, _ = _multiply(
            tile, chunk, last, rows, row_mask, unit, first_lane, x, saved, x_stride, weight, tiles,
            features, bases, strides, IN_ACT, M, N, K, W, True, FEATURE_GRAIN, 1, PRECISION,
            "select",
        )  # fmt: skip
        mask = dirty & ((tl.abs(some) < float("inf")) == 0)
        _put(
            some, rows, mask, unit, few, slot, num_rows, bias, y, z, partial,
            out_features, ACT, BIAS, KEEP, SPLIT, N,
        )  # fmt: skip


@triton.jit
def forward(
    x, weight, packed, bias, y, z, partial,
    parts, tiles, units, features, packed_features, bases, strides,
    num_rows, x_stride, out_features, num_parts,
    ACT: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr, SPLIT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, SHARED: tl.constexpr,
    PACKED: tl.constexpr, FEATURE_GRAIN: tl.constexpr, PACKED_GRAIN: tl.constexpr,
    UNIT_GRAIN: tl.constexpr, WEIGHT_GRAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output, and z where KEEP, for M rows and PARTS parts.

    Programs of the same rows are neighbours, so that x comes from memory once and then from the
    L2 cache; within a program, parts find it in the L1 cache.
    """
    groups = tl.cdiv(num_parts, PARTS)
    rows = (tl.program_id(0) // groups).to(tl.int64) * M + tl.arange(0, M)
    row_mask = rows < num_rows
    start = tl.program_id(0) % groups * PARTS
    for part in range(start, tl.minimum(start + PARTS, num_parts)):
        _part(
            tl.load(parts + part * 4), tl.load(parts + part * 4 + 1), tl.load(parts + part * 4 + 2),
            tl.load(parts + part * 4 + 3), rows, row_mask, num_rows, x, x, x_stride, weight, packed,
            tiles, units, features, packed_features, bases, strides, bias, y, z, partial,
            out_features, "none", ACT, BIAS, KEEP, SPLIT, M, N, K, SHARED, PACKED, FEATURE_GRAIN,
            PACKED_GRAIN, UNIT_GRAIN, WEIGHT_GRAIN, PRECISION,
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
    unit = _units(units, tile, lane, UNIT_GRAIN, N)
    acc = tl.zeros((M, N), tl.float32)
    first = tl.load(splits + split * 3 + 1)
    at = (first.to(tl.int64) * num_rows + rows)[:, None] * N + lane[None, :]
    for _ in range(first, tl.load(splits + split * 3 + 2)):
        acc += tl.load(partial + at, mask=row_mask[:, None], other=0.0)
        at += tl.full((), N, tl.int64) * num_rows
    _epilogue(acc, rows, row_mask[:, None], unit, bias, y, z, out_features, ACT, BIAS, KEEP)


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
    unit = _units(units, tile, lane, UNIT_GRAIN, N)
    acc = tl.zeros((F, N), tl.float32)
    # Summed over its rows at the end, across threads.
    bias = tl.zeros((N, R) if TRANSPOSED else (R, N), tl.float32)
    for row in range(first_row, last_row, R):
        rows = row + tl.arange(0, R).to(tl.int64)
        row_mask = rows < last_row
        if TRANSPOSED:
            a = _load_transposed(x, feature, rows, row_mask, x_stride)
            b = _load_transposed(grad_y, unit, rows, row_mask, x_stride)
            acc = _dot(a, tl.trans(b), acc, PRECISION)
        else:
            a = _load(x, x, rows, row_mask, feature, x_stride, "none")
            b = _load(grad_y, saved, rows, row_mask, unit, out_features, ACT)
            acc = _dot(tl.trans(a), b, acc, PRECISION)
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
    items, tiles, units, features, bases, strides,
    x_parts, x_tiles, x_units, x_features, packed_features, x_bases, x_strides,
    num_rows, split_k_rows, x_stride, in_features, out_features, num_weights, num_items, num_parts,
    ACT: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    R: tl.constexpr, F: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr,
    FEATURE_GRAIN: tl.constexpr, UNIT_GRAIN: tl.constexpr, WEIGHT_GRAIN: tl.constexpr,
    XM: tl.constexpr, XN: tl.constexpr, XK: tl.constexpr, XPARTS: tl.constexpr,
    XSHARED: tl.constexpr, XPACKED: tl.constexpr, XFEATURE_GRAIN: tl.constexpr,
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
            rows = (first_row + local // groups * XM).to(tl.int64) + tl.arange(0, XM)
            row_mask = rows < last_row
            start = local % groups * XPARTS
            for part in range(start, tl.minimum(start + XPARTS, num_parts)):
                _part(
                    tl.load(x_parts + part * 4), tl.load(x_parts + part * 4 + 1),
                    tl.load(x_parts + part * 4 + 2), -1, rows, row_mask, num_rows, grad_y, saved,
                    out_features, transposed_weight, packed, x_tiles, x_units, x_features,
                    packed_features, x_bases, x_strides, grad_x, grad_x, grad_x, grad_x,
                    in_features, ACT, "none", False, False, False, XM, XN, XK, XSHARED, XPACKED,
                    XFEATURE_GRAIN, PACKED_GRAIN, XUNIT_GRAIN, XWEIGHT_GRAIN, PRECISION,
                )  # fmt: skip


@triton.jit
def total(
    weight_sums, bias_sums, grad_weight, grad_bias, num_weights, out_features, num_split_k,
    BIAS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """grad_W and grad_b from the sums of the split-K chunks, in their order."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    weights = at < num_weights
    acc = tl.zeros((SIZE,), tl.float32)
    sums = weight_sums + at
    for _ in range(num_split_k):
        acc += tl.load(sums, mask=weights, other=0.0)
        sums += num_weights
    tl.store(grad_weight + at, acc.to(grad_weight.dtype.element_ty), mask=weights)
    if BIAS:
        unit = at - num_weights
        units = (unit >= 0) & (unit < out_features)
        acc = tl.zeros((SIZE,), tl.float32)
        sums = bias_sums + unit
        for _ in range(num_split_k):
            acc += tl.load(sums, mask=units, other=0.0)
            sums += out_features
        tl.store(grad_bias + unit, acc.to(grad_bias.dtype.element_ty), mask=units)
