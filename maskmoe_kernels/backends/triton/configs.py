"""How work is cut for a chip: a few rules propose at most four ways, ``tune`` measures them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from maskmoe_kernels.layout.blocks import BlockLayout

#: The partial sums of the weight gradient take at most this many bytes.
WORKSPACE = 256 << 20
# Rows of a tile that a processor's L1 cache keeps while its program walks over all tiles.
_L1 = 96 << 10
# Every part in one program.
ALL = 1 << 20


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
    """

    rows: int
    lanes: int
    depth: int
    parts: int
    warps: int
    stages: int


def candidates(
    layout: BlockLayout, rows: int, dtype: torch.dtype, precision: str, processors: int
) -> list[Config]:
    """At most four ways to compute ``layout``'s product over ``rows`` rows, the likeliest first.

    Tiles are as wide as the row block of the average weight; as high as leaves every processor
    two programs; and a program walks all tiles of its rows if those rows stay in its L1 cache.
    """
    exact = dtype == torch.float32 and precision == "ieee"
    lanes = min(64 if exact else 128, max(16, _power(_width(layout))))
    tiles = sum(math.ceil(units / lanes) for units in layout.row_sizes)
    enough = 2 * processors
    high = next((m for m in (128, 64, 32) if rows / m * tiles >= enough), 16)
    high = min(high, 32 if exact else 128, max(16, _power(rows)))
    near = high * layout.in_features * dtype.itemsize <= _L1
    first = _config(high, lanes, ALL if near and rows / high >= enough else 1, exact)
    other_high = max(16, high // 2) if high >= 64 else high * 2
    options = [
        first,
        _config(other_high, lanes, first.parts, exact),
        replace(first, parts=1 if first.parts == ALL else ALL),
        _config(high, lanes // 2 if lanes > 32 else lanes * 2, first.parts, exact),
    ]
    return list(dict.fromkeys(options))


def gradient_options(
    of_weight: list[Config], of_x: list[Config], dtype: torch.dtype
) -> list[tuple[Config, Config]]:
    """At most four ways to take both gradients in one launch: grad_W's cut and grad_x's.

    ``rows`` of the first are those of a step through the batch.
    """
    step = 16 if of_weight[0].stages == 1 else 64 if dtype.itemsize == 2 else 32
    pairs = [
        (of_weight[min(k, len(of_weight) - 1)], of_x[min(k, len(of_x) - 1)])
        for k in range(max(len(of_weight), len(of_x)))
    ]
    return list(dict.fromkeys((replace(w, rows=step, parts=1), x) for w, x in pairs))


def item_features(layout: BlockLayout, config: Config) -> int:
    """Features of an item of grad_W, where its tile holds one row block."""
    most = 32 if config.stages == 1 else 128 if config.lanes <= 64 else 64
    return min(most, max(16, _power(max(layout.row_fan_in, default=1))))


def slabs(rows: int, items: int, sums: int, processors: int) -> int:
    """Into how many slabs of rows the weight gradient's work is cut.

    Enough for two programs a processor, not so many that a slab has under 256 rows or the
    ``sums`` partial sums of each slab, in float32, pass ``WORKSPACE``.
    """
    wanted = math.ceil(2 * processors / max(items, 1))
    return max(1, min(wanted, rows // 256, WORKSPACE // (4 * max(sums, 1))))


def _config(rows: int, lanes: int, parts: int, exact: bool) -> Config:
    if exact:  # the plain units multiply out of registers: small tiles, nothing in flight
        return Config(rows, lanes, 16, parts, 4, 1)
    return Config(
        rows, lanes, 64 if lanes >= 64 else 32, parts, 8 if rows * lanes >= 8192 else 4, 3
    )


@lru_cache(maxsize=1024)
def _width(layout: BlockLayout) -> float:
    """Units of the row block that the average weight belongs to."""
    weights = [u * f for u, f in zip(layout.row_sizes, layout.row_fan_in, strict=True)]
    total = sum(weights)
    if not total:
        return max(layout.row_sizes)
    return sum(u * w for u, w in zip(layout.row_sizes, weights, strict=True)) / total


def _power(value: float) -> int:
    return 1 << max(0, math.ceil(math.log2(max(value, 1))))
