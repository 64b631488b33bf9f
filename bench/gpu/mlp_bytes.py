"""``python -m bench.gpu.mlp_bytes FILE``: where the CUDA networks add up a training step.

Counted from the shapes, without a GPU: estimates, not measurements. A block of threads takes tiles
of rows and adds each tile's weight gradients to sums of its own (``csrc/cuda``). Which of them lie
in shared memory follows from the room that a tile leaves; ``tests/bench`` holds the sizes here to
what the kernels ask for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.networks.mlp_training import NAMES, OURS, build
from bench.networks.training import MOVIELENS
from maskmoe_kernels import BlockLayout
from maskmoe_kernels.experiments.shared.report import write_json
from maskmoe_kernels.models import InterpretableNCF

SIDE, RESIDENT, RESERVED, SMALL = 16, 2, 1024, 16 << 10  # as in csrc/cuda
#: An H200's multiprocessors, and bytes of shared memory of each and of a block at most.
PROCESSORS, SHARED, LIMIT = 132, 228 << 10, 227 << 10
BLOCK = 4 * SIDE * SIDE  #: bytes of the sums of a block of weights
NOTE = "estimates from shapes for one H200; nothing here was measured"


def chunks(sizes: Sequence[int]) -> int:
    """How many chunks of 16 columns groups or experts are padded to."""
    return sum(-(-size // SIDE) for size in sizes)


@dataclass(frozen=True)
class Shape:
    """A network as the kernels see it.

    Attributes:
        inputs: Chunks of each layer's input.
        experts: One logit each.
        blocks: Of weights between two chunks, in all layers but the last.
        others: Bytes of the sums of the last layer's weights and of biases.
    """

    inputs: tuple[int, ...]
    experts: int
    blocks: int
    others: int

    @classmethod
    def of(cls, layouts: Sequence[BlockLayout]) -> Shape:
        """Of a chain of layouts."""
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
        """Bytes of shared memory that a tile takes, values being ``size`` bytes long."""
        values = size * rows * sum(SIDE * n + SIDE // size for n in self.inputs)
        floats = 4 * (3 * rows * (self.experts + 1) + 2 * self.experts + 1)
        return -(-(values + floats) // SIDE) * SIDE

    @property
    def sums(self) -> int:
        """Bytes of a block's sums."""
        return BLOCK * self.blocks + self.others

    def near(self, tile: int) -> int:
        """Bytes of them in shared memory."""
        resident = max(1, min(RESIDENT, SHARED // (tile + RESERVED)))
        left = min(SHARED // resident - RESERVED, LIMIT) - tile - self.others
        if left < 0:
            return 0
        if BLOCK * self.blocks <= left and self.sums <= SMALL:
            return self.sums
        return self.others + (BLOCK * min(self.blocks, left // BLOCK) if resident == 1 else 0)


def estimate(shape: Shape, batch: int, size: int) -> dict[str, Any]:
    """Of a step; ``before`` is with all sums beyond the chip, one block's on their way a warp."""
    high = 32 if size == 4 else 64
    rows = high if shape.tile(high, size) <= LIMIT else high // 2
    tile, tiles = shape.tile(rows, size), -(-batch // rows)
    resident = max(1, min(RESIDENT, SHARED // (tile + RESERVED)))
    blocks = min(tiles, resident * PROCESSORS)
    near = shape.near(tile)

    def moved(far: int) -> dict[str, int]:
        """Each tile but a block's first reads them, each writes them; at last all are read."""
        return {
            "bytes": (2 * tiles - blocks) * far + blocks * (2 * shape.sums - far),
            "footprint": blocks * far,
        }

    def flying(ahead: int) -> int:
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
            "bytes_on_their_way": flying(1),
            "reads_in_a_row": {"finish": blocks, "reduce": -(-blocks // 8)},
        },
        "after": {
            **moved(shape.sums - near),
            "bytes_on_their_way": flying(2 if size == 4 else 4),
            "reads_in_a_row": dict.fromkeys(("finish", "reduce"), -(-blocks // 64)),
        },
    }


def layouts_of(network: str) -> Sequence[BlockLayout]:
    """Of one of the networks that :mod:`bench.networks.mlp_training` trains."""
    if network == "movielens":
        return InterpretableNCF(MOVIELENS).experts.layers.layouts
    net: Any = build(OURS, network)
    return net.layers.layouts


def table(batch: int = 65536) -> dict[str, Any]:
    """Of every network, in float32 and bfloat16."""
    shapes = {name: Shape.of(layouts_of(name)) for name in NAMES}
    results = [
        {"network": name, "dtype": dtype, **estimate(shape, batch, size)}
        for name, shape in shapes.items()
        for dtype, size in (("float32", 4), ("bfloat16", 2))
    ]
    return {"note": NOTE, "estimate": True, "batch": batch, "results": results}


if __name__ == "__main__":
    write_json(Path(sys.argv[1]), table())
