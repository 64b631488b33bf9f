"""Bytes of partial weight gradients in the CUDA kernels: ``python -m bench.gpu.mlp_bytes FILE``.

Counted from the shapes, without a GPU: estimates, not measurements. In a training step of a whole
network, a thread block takes tiles of rows and adds the weight gradients of each tile to sums of
its own (``csrc/cuda``). Sums that fit beside a tile lie in shared memory, the others in device
memory.
``tests/bench`` checks the sizes here against what the kernels ask for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.networks.mlp_training import NAMES, OURS, build
from bench.networks.training import MOVIELENS_1M
from maskmoe_kernels import BlockLayout
from maskmoe_kernels.experiments.shared.report import write_json
from maskmoe_kernels.models import InterpretableNCF

SIDE, RESIDENT, RESERVED, SMALL = 16, 2, 1024, 16 << 10  # as in csrc/cuda
#: Of an H200: multiprocessors, bytes of shared memory of each, most bytes of a thread block.
PROCESSORS, SHARED, LIMIT = 132, 228 << 10, 227 << 10
BLOCK = 4 * SIDE * SIDE  #: bytes of the sums of one block of weights
NOTE = "estimates from shapes for one H200; nothing here was measured"


def chunks(sizes: Sequence[int]) -> int:
    """Number of chunks of 16 columns, to which groups or experts are padded."""
    return sum(-(-size // SIDE) for size in sizes)


@dataclass(frozen=True)
class Shape:
    """A network as the kernels store it.

    Attributes:
        inputs: Number of chunks of each layer's input.
        experts: Number of experts, each with one logit.
        blocks: Number of blocks of weights between two chunks, without the last layer.
        others: Bytes of the sums of the last layer's weights and of all biases.
    """

    inputs: tuple[int, ...]
    experts: int
    blocks: int
    others: int

    @classmethod
    def of(cls, layouts: Sequence[BlockLayout]) -> Shape:
        """The shape of a chain of layouts."""
        *hidden, last = layouts

        def seen(layout: BlockLayout, i: int) -> int:
            row = layout.present[i].tolist()
            return chunks([n for n, sees in zip(layout.col_sizes, row, strict=True) if sees])

        experts = len(last.row_sizes)
        blocks = sum(
            chunks([units]) * seen(layout, i)
            for layout in hidden
            for i, units in enumerate(layout.row_sizes)
        )
        entries = sum(seen(last, i) for i in range(experts))
        biases = SIDE * sum(chunks(layout.row_sizes) for layout in hidden) + experts
        others = -(-4 * (SIDE * entries + biases) // SIDE) * SIDE
        return cls(tuple(chunks(layout.col_sizes) for layout in layouts), experts, blocks, others)

    def tile(self, rows: int, size: int) -> int:
        """Bytes of shared memory that a tile takes, with values of ``size`` bytes."""
        values = size * rows * sum(SIDE * n + SIDE // size for n in self.inputs)
        floats = 4 * (3 * rows * (self.experts + 1) + 2 * self.experts + 1)
        return -(-(values + floats) // SIDE) * SIDE

    @property
    def sums(self) -> int:
        """Bytes of the sums of a thread block."""
        return BLOCK * self.blocks + self.others

    def near(self, tile: int) -> int:
        """Bytes of these sums that lie in shared memory beside a tile."""
        resident = max(1, min(RESIDENT, SHARED // (tile + RESERVED)))
        left = min(SHARED // resident - RESERVED, LIMIT) - tile - self.others
        if left < 0:
            return 0
        if BLOCK * self.blocks <= left and self.sums <= SMALL:
            return self.sums
        return self.others + (BLOCK * min(self.blocks, left // BLOCK) if resident == 1 else 0)


def estimate(shape: Shape, batch: int, size: int) -> dict[str, Any]:
    """Estimate of a step. ``before``: all sums in device memory, one block in flight a warp."""
    high = 32 if size == 4 else 64
    rows = high if shape.tile(high, size) <= LIMIT else high // 2
    tile, tiles = shape.tile(rows, size), -(-batch // rows)
    resident = max(1, min(RESIDENT, SHARED // (tile + RESERVED)))
    blocks = min(tiles, resident * PROCESSORS)
    near = shape.near(tile)

    def moved(far: int) -> dict[str, int]:
        """Every tile writes the sums; all but the first of a block read them; reduce reads all."""
        return {
            "bytes": (2 * tiles - blocks) * far + blocks * (2 * shape.sums - far),
            "footprint": blocks * far,
        }

    def in_flight(ahead: int) -> int:
        return 8 * resident * ahead * BLOCK

    return {
        "rows_of_a_tile": rows,
        "blocks": blocks,
        "blocks_of_a_processor": resident,
        "tile_bytes": tile,
        "sums_bytes": shape.sums,
        "near_bytes": near,
        "before": {
            **moved(shape.sums),
            "bytes_on_their_way": in_flight(1),
            "reads_in_a_row": {"finish": blocks, "reduce": -(-blocks // 8)},
        },
        "after": {
            **moved(shape.sums - near),
            "bytes_on_their_way": in_flight(2 if size == 4 else 4),
            "reads_in_a_row": dict.fromkeys(("finish", "reduce"), -(-blocks // 64)),
        },
    }


def layouts_of(network: str) -> Sequence[BlockLayout]:
    """The layouts of a network of :mod:`bench.networks.mlp_training`."""
    if network == "movielens":
        return InterpretableNCF(MOVIELENS_1M).experts.layers.layouts
    net: Any = build(OURS, network)
    return net.layers.layouts


def table(batch: int = 65536) -> dict[str, Any]:
    """Estimates of every network, in float32 and bfloat16."""
    shapes = {name: Shape.of(layouts_of(name)) for name in NAMES}
    results = [
        {"network": name, "dtype": dtype, **estimate(shape, batch, size)}
        for name, shape in shapes.items()
        for dtype, size in (("float32", 4), ("bfloat16", 2))
    ]
    return {"note": NOTE, "estimate": True, "batch": batch, "results": results}


if __name__ == "__main__":
    write_json(Path(sys.argv[1]), table())
