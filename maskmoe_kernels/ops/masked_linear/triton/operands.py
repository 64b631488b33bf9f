"""What is put in order before a product: weights by tiles, matrices by columns, grad_z."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.ops.masked_linear.triton import kernels
from maskmoe_kernels.ops.masked_linear.triton.configs import Config
from maskmoe_kernels.ops.masked_linear.triton.products import Product
from maskmoe_kernels.ops.masked_linear.triton.tiles import Tiles
from maskmoe_kernels.ops.triton_support.launcher import Described, Launch

# Entries of grad_z that a program of ``form`` forms.
_FORMED = 4096
# Weights that a program of ``pack`` packs.
_PACKED = 1024
# Rows and columns that a program of ``transpose`` moves.
_SQUARE = 64


class Packing:
    """Puts weights into the order of the tiles of ``product``, where ``config`` says so.

    Attributes:
        parts: Those of the packed tiles; else of ``tiles``, as for the next two.
        features: Of the chunks.
        grain: Aligned runs of this many features lie together in every chunk.
        is_on: Are weights packed?
        tma: Do descriptors name the blocks?
    """

    def __init__(
        self,
        product: Product,
        config: Config,
        tiles: Tiles,
        device: torch.device,
        rows: int,
        stride: int,
    ) -> None:
        """``rows`` begin ``stride`` apart in the matrix that is multiplied."""
        self._launch: Launch | None = None
        #: How descriptors name the blocks of what is multiplied, where they do.
        self.described: tuple[Described, ...] = ()
        self.parts, self.features = tiles.parts, tiles.features
        self.grain, self.is_on, self.tma = tiles.feature_grain, config.packed, config.tma
        self._device = device.index
        if config.packed:
            packed = product.packed(config, device)
            self.parts, self.features = packed.parts, packed.features
            self.grain, self._size = packed.feature_grain, packed.index.numel()
            self._launch = Launch(
                kernels.pack, (triton.cdiv(self._size, _PACKED),), packed.index, self._size,
                SIZE=_PACKED,
            )  # fmt: skip
        if config.tma:
            lanes, depth = config.lanes, config.depth
            columns = product.layout.in_features
            self.described = (
                Described(rows, columns, stride, (config.rows, depth)),
                Described(self._size // depth, depth, depth, (lanes, depth)),
            )

    def blocks(self, rows: Tensor, packed: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Whose blocks descriptors name."""
        return (rows, packed) if self.tma else (None, None)

    def __call__(self, weight: Tensor) -> Tensor:
        """The packed weights; ``weight`` itself where they are not packed."""
        if self._launch is None or not self._size:
            return weight
        packed = weight.new_empty(self._size)
        self._launch(self._device, weight.contiguous(), packed)
        return packed


class Transposed:
    """Transposes grad_z and x for a weight gradient that asks for it.

    Attributes:
        stride: Of what that gradient reads: from one row of x to the next, or from one column of
            it to the next where it is transposed.
    """

    def __init__(self, x: Tensor, stride: int, layout: BlockLayout, is_on: bool) -> None:
        self._device, self.is_on, self.stride = x.device.index, is_on, stride
        if is_on:
            rows, self.stride = x.shape[0], triton.cdiv(x.shape[0], 16) * 16  # aligned columns
            self._launches = []
            self._columns = (layout.out_features, layout.in_features)
            for columns, of in zip(self._columns, (layout.out_features, stride), strict=True):
                grid = (triton.cdiv(rows, _SQUARE), triton.cdiv(columns, _SQUARE))
                sizes = (rows, columns, of, self.stride)
                self._launches.append(Launch(kernels.transpose, grid, *sizes, SIZE=_SQUARE))

    def __call__(self, grad_z: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What stands for grad_z, saved, and x."""
        made = []
        for launch, columns, matrix in zip(self._launches, self._columns, (grad_z, x), strict=True):
            made.append(x.new_empty(columns * self.stride))
            launch(self._device, matrix, made[-1])
        return made[0], made[0], made[1]


def forming(size: int, activation: str) -> Launch | None:
    """The launch that forms grad_z, of ``size`` entries; None where that is grad_y itself."""
    if activation == "none":
        return None
    grid = (triton.cdiv(size, _FORMED),)
    return Launch(kernels.form, grid, size, ACT=activation, SIZE=_FORMED)
