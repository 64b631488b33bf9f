"""What all products share on the GPU: loads, the product of a tile, its repair, its store.

What a lane may not see is either in none of its chunks, or (in shared tiles) multiplied by 0, and
rows for which that is not enough, with NaN or infinity in them, are done again (:func:`part`).
Padding is loaded as 0 on both sides of the product, so that no NaN beside the tile enters it.

Where PACKED, ``kernels.pack`` has put the weights into the order of the tiles first: for each chunk
a matrix of lanes x features, 0 where a lane does not see a feature. A step of the loop then loads
neighbouring weights from neighbouring addresses, and features are the inner dimension, as the
tensor cores want it for 32 bits.

Where TMA, every chunk is a run of neighbouring features besides, and tensor descriptors say where x
and the packed weights lie: the tensor memory accelerator copies a block for one instruction of one
thread. A block's rows beyond the matrix are 0; those beyond a program's rows are not stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from maskmoe_kernels.ops.masked_linear.triton.activations import activate, grad_before


@triton.jit
def load(matrix, saved, rows, row_mask, columns, stride, ACT: tl.constexpr):
    """Rows x columns of a matrix; times act'(saved) if there is an activation. Padding is 0."""
    mask = row_mask[:, None] & (columns >= 0)[None, :]
    at = rows[:, None] * stride + columns[None, :]
    value = tl.load(matrix + at, mask=mask, other=0.0)
    if ACT != "none":
        kept = tl.load(saved + at, mask=mask, other=0.0)
        value = grad_before(value.to(tl.float32), kept.to(tl.float32), ACT).to(value.dtype)
    return value


@triton.jit
def load_transposed(matrix, columns, rows, row_mask, stride):
    """Columns x rows of a matrix that lies column after column, ``stride`` apart. Padding is 0."""
    at = columns.to(tl.int64)[:, None] * stride + rows[None, :]
    return tl.load(matrix + at, mask=(columns >= 0)[:, None] & row_mask[None, :], other=0.0)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc`` + a b."""
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
        a = load(x, saved, rows, row_mask, feature, x_stride, ACT)
        if HOW == "clean":
            finite = tl.abs(a.to(tl.float32)) < float("inf")
            cleaned = tl.maximum(cleaned, 1 - finite.to(tl.int32))
            a = tl.where(finite, a, 0.0).to(a.dtype)
        if SHARED:
            sees = lane_base >= 0
            at = lane_base[None, :] + depth[:, None] * lane_stride[None, :]
            b = tl.load(weight + at, mask=(feature >= 0)[:, None] & sees[None, :], other=0.0)
            if HOW == "select":
                product = dot(a, b, tl.zeros((M, W), tl.float32), PRECISION)
                acc += tl.where(sees[None, :], product, 0.0)
            else:
                acc = dot(a, b, acc, PRECISION)
        else:
            at = base + ((c - first) * K + depth)[:, None] * width + lane[None, :]
            b = tl.load(weight + at, mask=(feature >= 0)[:, None] & (unit >= 0)[None, :], other=0.0)
            acc = dot(a, b, acc, PRECISION)
        feature = _features(features, c + 1, last, GRAIN, K)
        lane_base = _bases(bases, lane, c + 1, last, WEIGHT_GRAIN, N, W, SHARED)
    return acc, tl.max(cleaned, 1)


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
        a = load(x, saved, rows, row_mask, feature, x_stride, ACT)
        if HOW == "clean":
            finite = tl.abs(a.to(tl.float32)) < float("inf")
            cleaned = tl.maximum(cleaned, 1 - finite.to(tl.int32))
            a = tl.where(finite, a, 0.0).to(a.dtype)
        b = tl.load(weights)
        acc = dot(a, tl.trans(b), acc, PRECISION)
        weights += N * K
        feature = _features(features, c + 1, last, GRAIN, K)
    return acc, tl.max(cleaned, 1)


@triton.jit
def _multiply_blocks(
    chunk, last, first_row, described, described_weights, features,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As :func:`_multiply_packed`, "plain", in blocks that descriptors name."""
    acc = tl.zeros((M, N), tl.float32)
    feature = tl.load(features + chunk * K, mask=chunk < last, other=0)
    for c in tl.range(chunk, last):
        a = described.load([first_row, feature])
        b = described_weights.load([c * N, 0])
        feature = tl.load(features + (c + 1) * K, mask=c + 1 < last, other=0)
        acc = dot(a, tl.trans(b), acc, PRECISION)
    return acc


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
        epilogue(acc, rows, mask, unit, bias, y, z, out_features, ACT, BIAS, KEEP)


@triton.jit
def epilogue(
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
def units_of(units, tile, lane, GRAIN: tl.constexpr, N: tl.constexpr):
    """The output units of a tile's lanes."""
    unit = tl.load(units + tile * N + lane)
    return tl.max_contiguous(tl.multiple_of(unit, GRAIN), GRAIN)


@triton.jit
def part(
    tile, chunk, last, slot, first_row, rows, row_mask, num_rows, x, saved, x_stride, weight,
    packed, described, described_weights, tiles, units, features, packed_features, bases, strides,
    bias, y, z, partial, out_features,
    IN_ACT: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr,
    SPLIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr,
    PACKED: tl.constexpr, TMA: tl.constexpr, FEATURE_GRAIN: tl.constexpr,
    PACKED_GRAIN: tl.constexpr, UNIT_GRAIN: tl.constexpr, WEIGHT_GRAIN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Multiplies and stores a part of a tile.

    In a shared tile a lane multiplies what it does not see by 0. That adds nothing, unless the
    value is not finite: then the lane's sum is not finite either, which is seen here, and rows
    with such values are done again, so that no lane's bits depend on what it does not see.
    """
    lane = tl.arange(0, N)
    unit = units_of(units, tile, lane, UNIT_GRAIN, N)
    if TMA:
        acc = _multiply_blocks(
            chunk, last, first_row, described, described_weights, packed_features, M, N, K,
            PRECISION,
        )  # fmt: skip
    elif PACKED:
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
            tile, chunk, last, rows, row_mask, units_of(units, tile, lane, UNIT_GRAIN, N), 0, x,
            saved, x_stride, weight, tiles, features, bases, strides, IN_ACT, M, N, K, N, True,
            FEATURE_GRAIN, WEIGHT_GRAIN, PRECISION, "clean",
        )  # fmt: skip
    dirty = (row_mask & (cleaned > 0))[:, None]
    tl.debug_barrier()  # other threads may have stored what is stored again here
    _put(
        acc, rows, dirty, units_of(units, tile, lane, UNIT_GRAIN, N), lane, slot, num_rows, bias, y,
        z, partial, out_features, ACT, BIAS, KEEP, SPLIT, N,
    )  # fmt: skip
    tl.debug_barrier()
    for first_lane in range(0, N, W):
        few = first_lane + tl.arange(0, W)
        unit = units_of(units, tile, few, 1, N)
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
