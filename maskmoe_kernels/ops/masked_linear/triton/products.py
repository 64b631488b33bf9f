"""A layout's tiles on a device, made once for every way to cut them that is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakSet, ref

import torch
from torch import Tensor

from maskmoe_kernels.errors import BackendError
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.serialized import registered_layout, transposed_layout
from maskmoe_kernels.ops.masked_linear.triton.configs import Config, candidates, packed_options
from maskmoe_kernels.ops.masked_linear.triton.packed import Chunks, Packed, cut_chunks, pack_tables
from maskmoe_kernels.ops.masked_linear.triton.tiles import Tiles, cut
from maskmoe_kernels.ops.triton_support.device import is_capturing, processors

_T = TypeVar("_T")
# Blocks are too fine where tiles multiply this many times what a dense product would...
_MOST_PADDING = 2.0
# ...unless that is so little that it costs nothing worth a thought.
_FEW = 1 << 18
_MANY = 4096
# Fewer chunks than this are not worth the sum over the parts of a split tile.
_SHORT = 4
# Calls of so many kinds are kept ready.
_JOBS = 256
#: Configurations that are measured for a call.
MOST = 8


class Product:
    """The tiles of one layout, which whoever asks for them holds.

    Args:
        layout: The layout.
        origin: Where its packed weights stand among those of the layer; ``None``: they are those.
    """

    def __init__(self, layout: BlockLayout, origin: Tensor | None = None) -> None:
        self._layout = ref(layout)  # tiles are kept as long as their layout: not the other way
        self._origin = origin
        self._chunks: dict[tuple[int, int], Chunks] = {}
        self._host: dict[tuple[int, int], Tiles] = {}
        self._device: dict[tuple[object, ...], Any] = {}

    @property
    def layout(self) -> BlockLayout:
        """The layout."""
        layout = self._layout()
        if layout is None:
            raise ReferenceError("tiles of a layout that nobody holds any more")
        return layout

    def options(
        self, rows: Tensor, precision: str, gradient: bool = False, tma: bool = False
    ) -> list[Config]:
        """Ways to multiply ``rows``, the likeliest first; or to take the weight gradient.

        Args:
            rows: ``(rows, columns of the layout)``.
            precision: How products are taken: ``tl.dot``'s input precision.
            gradient: It is the product of x and grad_y, which gives grad_W.
            tma: Can the tensor memory accelerator read ``rows``?
        """
        count, dtype = processors(rows.device), rows.dtype
        found = candidates(self.cut, self.layout, rows.shape[0], dtype, precision, count, gradient)
        if gradient:
            return found
        packed = packed_options(self.chunks, self.layout, rows.shape[0], dtype, precision, tma)
        return [*packed, *found[: MOST - len(packed)]]

    def chunks(self, lanes: int, depth: int) -> Chunks:
        """The features of packed tiles, on the CPU."""
        chunks = self._chunks.get((lanes, depth))
        if chunks is None:
            chunks = self._chunks[lanes, depth] = cut_chunks(self.layout, lanes, depth)
        return chunks

    def packed(self, config: Config, device: torch.device) -> Packed:
        """The tables of packed tiles on ``device``."""
        chunks = self.chunks(config.lanes, config.depth)
        key = ("packed", config.lanes, config.depth, device)
        return self._on(key, lambda: pack_tables(self.layout, chunks, self._origin).to(device))

    def cut(self, lanes: int, depth: int) -> Tiles:
        """The tiles, on the CPU."""
        tiles = self._host.get((lanes, depth))
        if tiles is None:
            tiles = self._host[lanes, depth] = cut(self.layout, lanes, depth)
        return tiles

    def tiles(self, config: Config, device: torch.device, row_tiles: int | None = None) -> Tiles:
        """The tiles on ``device``.

        With ``row_tiles``, long ones are split where few rows leave processors without work.
        """
        host = self.cut(config.lanes, config.depth)
        longest = None
        if row_tiles is not None and config.parts == 1 and not config.packed:
            enough = 2 * processors(device)
            share = max(_SHORT, math.ceil(row_tiles * host.chunk_walks / enough))
            share = 1 << (share - 1).bit_length()  # few kinds of tables
            if row_tiles * host.num_tiles < enough and host.longest > share:
                longest = share
        key = ("tiles", config.lanes, config.depth, longest, device)
        return self._on(key, lambda: (host if longest is None else host.split(longest)).to(device))

    def items(self, config: Config, features: int, device: torch.device) -> Tensor:
        """Work of the weight gradient on ``device``; see :meth:`Tiles.weight_items`."""
        host = self.cut(config.lanes, config.depth)
        key = ("items", config.lanes, config.depth, features, device)
        return self._on(key, lambda: host.weight_items(features).to(device))

    def _on(self, key: tuple[object, ...], make: Callable[[], _T]) -> _T:
        found: _T | None = self._device.get(key)
        if found is None:
            if is_capturing():
                raise BackendError(
                    "a CUDA graph is being captured, and the tables of this layout are not on the "
                    "GPU yet; run one forward and backward of this size before the capture"
                )
            found = self._device[key] = make()
        return found


class Pair:
    """The products of a layer: forward, and transposed for grad_x.

    Attributes:
        forward: The layout's.
        transposed: Of its routed blocks, rows and columns exchanged.
        fits: Whether tiles are worth their padding.
        jobs: What was made ready for a call, by all that it depends on; ``launch`` fills it.
        chosen: Configurations by kind of call and device; ``tune`` fills it.
    """

    def __init__(self, layout: BlockLayout) -> None:
        self.forward = Product(layout)
        self._transposed_layout, self._index = transposed_layout(layout)
        self.transposed = Product(self._transposed_layout, self._index)
        self.jobs: dict[Hashable, Callable[..., None]] = {}
        self.chosen: dict[tuple[str, torch.device], Any] = {}
        products = self.forward, self.transposed
        self.fits = layout.num_weights < 2**31 and all(map(_fits, products))
        _pairs.add(self)

    def index(self, device: torch.device) -> Tensor:
        """Where the weights of the transposed layout stand among the layer's, on ``device``."""
        return self.transposed._on(("index", device), lambda: self._index.to(device))

    def keep(self, case: Hashable, job: Callable[..., None]) -> None:
        """Keep ``job`` for further calls of this kind; batches of ever new sizes fill no memory."""
        if len(self.jobs) >= _JOBS:
            self.jobs.clear()
        self.jobs[case] = job


# All that live, for ``forget``; each belongs to a layout.
_pairs: WeakSet[Pair] = WeakSet()


def products_of(layout: BlockLayout) -> Pair:
    """The products of ``layout``, made on first use, and shared by equal layouts."""
    registered = registered_layout(layout)
    return registered.caches.derive("triton", lambda: Pair(registered))


def forget() -> None:
    """Choose each configuration, and make each job ready, anew."""
    for pair in _pairs:
        pair.jobs.clear()
        pair.chosen.clear()


def _fits(product: Product) -> bool:
    layout = product.layout
    if layout.num_blocks > _MANY and not layout.has_blocks:  # not worth the time to cut them
        return False
    rows = torch.empty(128, 0, dtype=torch.bfloat16, device="cpu")  # so few are never packed
    config = product.options(rows, "ieee")[0]
    padded = product.cut(config.lanes, config.depth).chunk_walks * config.depth * config.lanes
    return padded <= max(_FEW, _MOST_PADDING * layout.out_features * layout.in_features)
