"""How work is cut for a chip: a short model proposes a few ways, ``tune`` measures them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.ops.masked_linear.triton.packed import Chunks
from maskmoe_kernels.ops.masked_linear.triton.tiles import Tiles

#: The partial sums of the weight gradient take at most this many bytes.
WORKSPACE = 256 << 20
# Rows of a tile that a processor's L1 cache keeps while its program walks over all tiles.
_L1 = 96 << 10
# Every part in one program.
ALL = 1 << 20
# Rows from which on packed weights are worth a launch of their own, and how many may be packed:
# their index takes four bytes each.
_PACKED_ROWS = 4096
_MOST_PACKED = 16 << 20
# The inner dimension of a block that a tensor descriptor names has so many bytes, or it pays less.
_LEAST_BLOCK = 64
# Of a multiprocessor.
_REGISTERS = 1 << 16
# What the model takes a GPU for, a microsecond. Only ratios matter, and ``tune`` measures.
_MEMORY, _CACHE = 4e6, 6e6  # bytes
_PRODUCTS = {"16 bit": 350e6, "tf32": 175e6, "tf32x3": 60e6, "ieee": 15e6}
_PACKED_PRODUCTS = {"16 bit": 600e6, "tf32": 300e6}


@dataclass(frozen=True)
class Config:
    """One way to cut a product.

    Attributes:
        rows: Rows of a tile.
        lanes: Units of a tile.
        depth: Features of a chunk.
        parts: Tiles that a program walks one after another, at most.
        warps: Warps of a program.
        stages: Chunks in flight.
        packed: Are the weights put into the order of the tiles first?
        tma: Of packed weights: does the tensor memory accelerator copy them, and the rows?
        apart: Of grad_W: does grad_x have a launch of its own?
        formed: Of grad_W: is the gradient before the activation formed once, beforehand?
        transposed: Of grad_W: are x and that gradient transposed beforehand? Tensor cores take
            factors of 32 bits only with the summed dimension, here the rows, as the inner one.
        features: Of grad_W: features of an item, as :func:`item_features` says where it is 0.
    """

    rows: int
    lanes: int
    depth: int
    parts: int
    warps: int
    stages: int
    packed: bool = False
    tma: bool = False
    apart: bool = False
    formed: bool = False
    transposed: bool = False
    features: int = 0


def candidates(
    cut: Callable[[int, int], Tiles],
    layout: BlockLayout,
    rows: int,
    dtype: torch.dtype,
    precision: str,
    processors: int,
    gradient: bool = False,
) -> list[Config]:
    """At most seven ways to compute ``layout``'s product over ``rows`` rows, the likeliest first.

    Tiles are as wide as the model below finds best; as high as leaves every processor two
    programs; and a program walks all tiles of its rows if those rows stay in its L1 cache.

    Args:
        cut: Gives the layout's tiles of so many lanes and so deep chunks.
        layout: Its columns are what is multiplied.
        rows: Rows of the batch.
        dtype: Of all matrices.
        precision: How products are taken: ``tl.dot``'s input precision.
        processors: Multiprocessors of the GPU.
        gradient: It is the product of x and grad_y, which gives grad_W.
    """
    exact = dtype == torch.float32 and precision == "ieee"
    found = []
    for lanes in (16, 32, 64) if exact else (16, 32, 64, 128):
        depth = 16 if exact else _depth(layout, lanes, dtype)
        tiles = cut(lanes, depth)
        cost = _cost(tiles, layout, rows, dtype, precision, processors, gradient)
        found.append((cost, lanes, depth, tiles))
    found.sort(key=lambda entry: entry[:2])
    _, lanes, depth, tiles = found[0]
    enough = 2 * processors
    high = next((m for m in (128, 64, 32) if rows / m * tiles.num_tiles >= enough), 16)
    # Registers: ragged features are loaded value by value; 3xTF32 splits every factor in two.
    hungry = precision == "tf32x3" or tiles.feature_grain < 8
    high = min(high, 32 if exact else 64 if hungry else 128, max(16, _power(rows)))
    near = high * layout.in_features * dtype.itemsize <= _L1
    parts = ALL if near and rows / high >= enough else 1
    first = _config(high, lanes, depth, parts, exact, precision)
    other_high = high // 2 if high >= 64 else high * 2
    most = 3 if dtype.itemsize == 2 else 2
    # Where row blocks share tiles, half-empty chunks may cost less than twice as many.
    deeper = [(n, 2 * k) for _, n, k, t in found[: most - 1] if t.shared and k < 64]
    options = [
        first,
        *(_config(high, n, k, parts, exact, precision) for _, n, k, _ in found[1:most]),
        _config(other_high, lanes, depth, parts, exact, precision),
        replace(first, parts=1 if parts == ALL else ALL),
        *(_config(high, n, k, parts, exact, precision) for n, k in deeper if most == 3),
    ]
    return list(dict.fromkeys(options))


def packed_options(
    chunks: Callable[[int, int], Chunks],
    layout: BlockLayout,
    rows: int,
    dtype: torch.dtype,
    precision: str,
    tma: bool,
) -> list[Config]:
    """At most six ways to multiply packed weights, the likeliest first.

    Args:
        chunks: Gives the chunks of packed tiles of so many lanes and so deep chunks.
        layout: Its columns are what is multiplied.
        rows: Rows of the batch.
        dtype: Of all matrices.
        precision: How products are taken: ``tl.dot``'s input precision.
        tma: Can the tensor memory accelerator read the rows?
    """
    narrow = dtype.itemsize == 2
    if rows < _PACKED_ROWS or not (narrow or precision == "tf32"):
        return []
    depth = min(64 if narrow else 32, max(16, _power(layout.in_features)))
    widest = max(16, _power(layout.out_features))
    found = []
    for lanes in (64, 128, 256) if widest > 64 else (widest,):
        cut = chunks(lanes, depth)
        entries = cut.features.size
        # A load of x takes 16 bytes, or as many instructions as it takes values.
        aligned = cut.grain * dtype.itemsize >= 16
        if lanes <= widest and aligned and entries * lanes <= _MOST_PACKED:
            products = entries * lanes / _PACKED_PRODUCTS["16 bit" if narrow else "tf32"]
            cached = entries * dtype.itemsize / _CACHE
            alone = 1.2 if lanes > 128 else 1.0  # a program takes all registers of a processor
            found.append((alone * (max(products, cached) + 0.2 * (products + cached)), lanes))
    found.sort()
    # Four warps issue fewer instructions for the same products; eight hold more sums.
    options = [
        Config(128, lanes, depth, 1, 8 if lanes > 64 else 4, 3, packed=True) for _, lanes in found
    ]
    options += [replace(c, warps=4) for c in options if c.lanes == 128]
    options += [replace(c, rows=64) for c in options if c.lanes <= 64]
    described = _described_options(chunks, [n for _, n in found], depth, dtype) if tma else []
    return [*described, *options[:4]]


def _described_options(
    chunks: Callable[[int, int], Chunks], lanes: list[int], depth: int, dtype: torch.dtype
) -> list[Config]:
    """At most two ways with tensor descriptors: where every chunk is a run of neighbours."""
    lanes = [n for n in lanes if n <= 128]
    for k in (depth, depth // 2):
        if lanes and k * dtype.itemsize >= _LEAST_BLOCK and chunks(lanes[0], k).runs:
            found = []
            for n in lanes:
                warps, stages = (8, 3) if n > 64 and k == depth else (4, 4)
                found.append(Config(128, n, k, 1, warps, stages, packed=True, tma=True))
            return found
    return []


def _cost(
    tiles: Tiles,
    layout: BlockLayout,
    rows: int,
    dtype: torch.dtype,
    precision: str,
    processors: int,
    gradient: bool,
) -> float:
    """Microseconds a row, roughly: the slower of products and bytes, on the processors at work."""
    entries = tiles.chunk_walks * tiles.depth
    loaded = float(entries)
    if gradient:  # beside its features, an item reads grad_y and what was saved
        features = item_features(layout, tiles, dtype, precision)
        loaded += (entries / features + tiles.num_tiles / 2) * 2 * tiles.lanes
    # A tensor core's operands come slower than it multiplies where a tile is narrow.
    lanes = tiles.lanes if precision == "ieee" and dtype == torch.float32 else max(64, tiles.lanes)
    products = entries * lanes / _PRODUCTS[precision if dtype == torch.float32 else "16 bit"]
    cached = loaded * dtype.itemsize / _CACHE
    moved = (layout.in_features + layout.out_features) * dtype.itemsize / _MEMORY
    busy = min(1.0, rows / 64 * tiles.num_tiles / processors)
    return (max(products, cached, moved) + 0.1 * (products + cached)) / busy


def _depth(layout: BlockLayout, lanes: int, dtype: torch.dtype) -> int:
    """Features of a chunk: a block's where row blocks share tiles, else what hides the latency."""
    most = 64 if lanes >= 64 and dtype.itemsize == 2 else 32
    if 2 * _mean(layout.row_sizes) <= lanes:
        return min(most, max(16, _power(_mean(layout.col_sizes))))
    return most


def gradient_options(
    of_weight: list[Config], of_x: list[Config], dtype: torch.dtype, most_units: int
) -> list[tuple[Config, Config]]:
    """At most eight ways to take both gradients: grad_W's cut and grad_x's, the likeliest first.

    ``rows`` of the first are those of a step through the batch; ``most_units`` are the layer's.
    """
    step = 16 if of_weight[0].stages == 1 else 64 if dtype.itemsize == 2 else 32
    of_weight = [replace(w, rows=step, parts=1) for w in of_weight]
    packed, plain = [x for x in of_x if x.packed], [x for x in of_x if not x.packed]
    together = [
        (of_weight[min(k, len(of_weight) - 1)], plain[min(k, len(plain) - 1)])
        for k in range(min(4, max(len(of_weight), len(plain))))
    ]
    narrow = dtype.itemsize == 2
    if not narrow and not packed:
        return list(dict.fromkeys(together))
    cuts = list(dict.fromkeys((w.lanes, w.depth) for w in of_weight))[:2]
    features = 128 if narrow else 0
    formed = [
        replace(of_weight[0], lanes=n, depth=k, formed=True, features=features) for n, k in cuts
    ]
    apart = [replace(w, apart=True) for w in formed]
    if not narrow:
        wide = [n for n in (128, 64) if n <= max(64, _power(most_units))]
        transposed = [
            replace(of_weight[0], lanes=n, apart=True, formed=True, transposed=True, features=n)
            for n in wide
        ]
        apart = [*transposed, *apart]
    if packed:
        pairs = [(apart[0], x) for x in packed[:4]]
        pairs += [(w, packed[0]) for w in apart[1:]]
        return list(dict.fromkeys([*pairs[:5], *together[:2], (apart[0], plain[0])]))
    pairs = [(w, plain[min(k, len(plain) - 1)]) for k, w in enumerate(apart)]
    return list(dict.fromkeys([*together, *pairs, (formed[0], plain[0])]))


def item_features(layout: BlockLayout, tiles: Tiles, dtype: torch.dtype, precision: str) -> int:
    """Features of an item of grad_W: whole chunks."""
    # Lanes with weights apart take registers for their addresses.
    wide = tiles.lanes > (32 if tiles.shared else 64)
    most = 64 if wide or dtype.itemsize > 2 else 128
    if dtype == torch.float32 and precision == "ieee":
        most = 32
    return max(tiles.depth, min(most, _power(max(layout.row_fan_in, default=1))))


def registers(
    tiles: Tiles,
    sums: int,
    warps: int,
    dtype: torch.dtype,
    backward: bool = False,
    packed: bool = False,
) -> int | None:
    """Limit of registers a thread for a kernel that can repair: what its main loop needs.

    Without a limit, the compiler gives the kernel what the repair needs, twice as many, and half as
    many programs run at once. With it, the repair spills some values to memory, which costs
    nothing until it runs.

    Args:
        tiles: That it walks. Only shared ones are repaired. Ragged features are loaded value by
            value, and how many registers that takes is not known. In both cases: no limit.
        sums: Float32 sums of a program.
        warps: Of a program.
        dtype: Of the factors; wide ones take more.
        backward: Is it the backward, which also forms the gradient before the activation?
        packed: Are weights packed? The limit is then as high as it can be for as many programs.
    """
    if not tiles.shared or tiles.feature_grain < 8:
        return None
    own = 64 + 16 * backward + 48 * (dtype.itemsize > 2) + 32 * (packed and warps < 8)
    needed = min(255, 8 * math.ceil((own + sums / (32 * warps)) / 8))
    if not packed:
        return needed
    programs = max(1, _REGISTERS // (32 * warps * needed))  # that run at once
    return min(255, _REGISTERS // (32 * warps * programs) // 8 * 8)


def split_k_chunks(rows: int, items: int, sums: int, processors: int, alone: bool = False) -> int:
    """Number of split-K chunks of rows of the weight gradient.

    Enough for two programs a processor, not so many that a chunk has under 256 rows or the
    ``sums`` partial sums of each chunk, in float32, pass ``WORKSPACE``. Where no other programs
    fill the processors at the end (``alone``), the number up to four times as high for which the
    last round of programs is fullest.
    """
    most = max(1, min(rows // 256, WORKSPACE // (4 * max(sums, 1))))
    at_once = 2 * processors
    wanted = min(most, math.ceil(at_once / max(items, 1)))
    if not alone:
        return wanted

    def time(chunks: int) -> float:  # of each chunk's rows, and of the sum over the chunks
        return math.ceil(items * chunks / at_once) / chunks + 1e-3 * chunks

    return min(range(max(1, wanted - 1), min(most, 4 * wanted) + 1), key=time)


def _config(rows: int, lanes: int, depth: int, parts: int, exact: bool, precision: str) -> Config:
    if exact:  # the plain units multiply out of registers: small tiles, nothing in flight
        return Config(rows, lanes, depth, parts, 4, 1)
    many = rows * lanes >= (4096 if precision == "tf32x3" else 8192)
    return Config(rows, lanes, depth, parts, 8 if many else 4, 3)


def _mean(sizes: Sequence[int]) -> float:
    return sum(sizes) / len(sizes)


def _power(value: float) -> int:
    return 1 << max(0, math.ceil(math.log2(max(value, 1))))
