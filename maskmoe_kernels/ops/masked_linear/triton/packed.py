"""Weights in the order of the tiles: where each of them stands, and which features they meet.

A packed tile has the units of the same tile of :func:`tiles.cut`, and chunks of ``depth`` features
that any of its row blocks reads, whichever reads which: the weight of a feature that a lane does
not see is 0. So chunks are full but for a tile's last one, however small the blocks are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.ops.masked_linear.triton.tiles import (
    grain_of,
    groups,
    moved,
    order_of,
    parts_of,
)


@dataclass(frozen=True)
class Packed:
    """The tables of one layout; int32, on one device once ``to`` was called.

    Attributes:
        index: ``(chunks, lanes, depth)``: position of each weight in the layout's packed weights,
            -1 where there is none.
        features: ``(chunks, depth)``: input feature, negative behind a tile's last one.
        parts: ``(tiles, 4)``: tile, first chunk, last chunk + 1, -1. Longest first.
        feature_grain: Aligned runs of this many features lie together in every chunk.
    """

    index: Tensor
    features: Tensor
    parts: Tensor
    feature_grain: int

    def to(self, device: torch.device) -> Packed:
        """The same tables on ``device``."""
        return moved(self, device)


@dataclass(frozen=True)
class Chunks:
    """The features of packed tiles, without their weights.

    Attributes:
        lanes: Units of a tile.
        tiles: For each tile its row blocks, the first lane among their units, and the column blocks
            that any of them reads.
        features: ``(chunks, depth)`` int32: input feature, negative behind a tile's last one.
        counts: Chunks of each tile.
        grain: Aligned runs of this many features lie together in every chunk.
    """

    lanes: int
    tiles: list[tuple[np.ndarray, int, np.ndarray]]
    features: np.ndarray
    counts: list[int]
    grain: int

    @property
    def runs(self) -> bool:
        """Is every chunk one run of neighbouring features, without padding?"""
        runs = (self.features >= 0).all() and (np.diff(self.features) == 1).all()
        return bool(len(self.features) and runs)


def cut_chunks(layout: BlockLayout, lanes: int, depth: int) -> Chunks:
    """The features of ``layout``'s packed tiles.

    Args:
        layout: Its rows are the units, its columns the features.
        lanes: Units of a tile, a power of two of at least 16.
        depth: Features of a chunk, a power of two of at least 16.
    """
    sizes, offsets = np.array(layout.col_sizes), np.array(layout.col_offsets)
    order = order_of(layout.col_order, layout.in_features)
    tables, counts = [np.zeros((0, depth), dtype=np.int32)], []
    tiles = list(_packed_tiles(layout, lanes))
    for _, _, columns in tiles:
        column, within = _entries(sizes[columns])
        counts.append(-(-len(column) // depth))
        table = np.arange(-counts[-1] * depth, 0, dtype=np.int32)
        table[: len(column)] = order[offsets[columns][column] + within]
        tables.append(table.reshape(-1, depth))
    features = np.concatenate(tables)
    return Chunks(lanes, tiles, features, counts, grain_of(features))


def pack_tables(layout: BlockLayout, chunks: Chunks, origin: Tensor | None) -> Packed:
    """The tables of ``layout``, whose packed tiles have these ``chunks``.

    Args:
        layout: Its rows are the units, its columns the features.
        chunks: Of :func:`cut_chunks`.
        origin: Where ``layout``'s packed weights stand in the tensor that is packed;
            ``None``: they are that tensor.
    """
    row_sizes, col_sizes = np.array(layout.row_sizes), np.array(layout.col_sizes)
    present = layout.present.numpy()
    seen = present * col_sizes
    starts = seen.cumsum(1) - seen  # of each column block in the rows of a row block's weights
    weights = np.array(layout.weight_offsets)
    lanes, depth = chunks.lanes, chunks.features.shape[1]
    index = [np.zeros((0, lanes, depth), dtype=np.int32)]
    for (members, first_lane, columns), count in zip(chunks.tiles, chunks.counts, strict=True):
        column, within = _entries(col_sizes[columns])
        sees = present[members][:, columns][:, column]
        place = (starts[members][:, columns][:, column] + within) * row_sizes[members][:, None]
        place = np.where(sees, weights[members][:, None] + place, -1)
        units = row_sizes[members]
        member = np.repeat(np.arange(len(members)), units)[first_lane : first_lane + lanes]
        unit = np.concatenate([np.arange(n) for n in units])[first_lane : first_lane + lanes]
        of_lane = place[member]
        of_lane = np.where(of_lane < 0, -1, of_lane + unit[:, None])
        full = np.full((lanes, count * depth), -1, dtype=np.int32)
        full[: len(member), : len(column)] = of_lane
        index.append(full.reshape(lanes, count, depth).transpose(1, 0, 2))
    ends = np.cumsum(chunks.counts).tolist()
    bounds = [(0, 0, end - n, end) for n, end in zip(chunks.counts, ends, strict=True)]
    parts, _ = parts_of(np.array(bounds, dtype=np.int32).reshape(-1, 4), None)
    places = torch.from_numpy(np.ascontiguousarray(np.concatenate(index)))
    if origin is not None and origin.numel():
        places = torch.where(places < 0, places, origin[places.clamp(min=0).long()].int())
    return Packed(places, torch.from_numpy(chunks.features), torch.from_numpy(parts), chunks.grain)


def _entries(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each feature of column blocks of these sizes, its column block and its place there."""
    column = np.repeat(np.arange(len(sizes)), sizes)
    return column, np.arange(len(column)) - np.repeat(sizes.cumsum() - sizes, sizes)


def _packed_tiles(layout: BlockLayout, lanes: int) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
    """Row blocks, first lane among their units, and the column blocks that any of them reads."""
    present = layout.present.numpy()
    for group in groups(layout, lanes):
        members = np.array(group)
        columns = np.flatnonzero(present[members].any(0))
        for first_lane in range(0, int(np.array(layout.row_sizes)[members].sum()), lanes):
            yield members, first_lane, columns
