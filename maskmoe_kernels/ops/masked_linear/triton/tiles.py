"""A layout cut into tiles for a GPU: integer tables that the kernels walk.

A *tile* is a set of at most ``lanes`` output units, one a lane, and the features they read. Its
features stand in *chunks* of ``depth``, padded with negative numbers at the end, so that a kernel
gathers ``x[:, features[chunk]]`` and multiplies it by the weights of the chunk. Absent blocks are
in no chunk.

Wide row blocks have tiles of their own (*plain*). Row blocks of which several fit into a tile
share one: there a chunk holds features that the same row blocks read, and ``bases`` says for each
lane where its weights start, or -1 where the lane does not read the chunk and keeps its sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from maskmoe_kernels.layout.blocks import BlockLayout

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Tables = TypeVar("_Tables", bound="DataclassInstance")
# Groups of this many features or units are loaded together where they lie together.
_GRAINS = (16, 8, 4, 2)
# Above this many row blocks, finding the best company for each costs more than it brings.
_MANY = 2048


@dataclass(frozen=True)
class Tiles:
    """The tables of one layout; int32, on one device once ``to`` was called.

    Attributes:
        lanes: Units of a tile.
        depth: Features of a chunk.
        shared: Whether a tile holds several row blocks; only then have ``bases`` and ``strides``
            entries.
        parts: ``(parts, 4)``: tile, first chunk, last chunk + 1, slot in the workspace of partial
            sums or -1 where the part is all of its tile. Longest first.
        splits: ``(split tiles, 3)``: tile, first slot, last slot + 1.
        tiles: ``(tiles, 4)``: first weight of lane 0, units of its row block, first chunk, last
            chunk + 1. The first two are of use in plain tiles.
        units: ``(tiles, lanes)``: output unit of each lane, negative where there is none.
        features: ``(chunks, depth)``: input feature, negative where there is none.
        bases: ``(chunks, lanes)``: position of the chunk's first weight for each lane, or -1.
        strides: ``(tiles, lanes)``: from a lane's weight for one feature to the next.
        chunk_walks: Chunks that one row tile multiplies, each as often as a tile reads it.
        longest: Chunks of the longest tile.
        feature_grain: Aligned runs of this many features lie together in every chunk.
        unit_grain: The same for units.
        weight_grain: The same for the weights of neighbouring lanes.
    """

    lanes: int
    depth: int
    shared: bool
    parts: Tensor
    splits: Tensor
    tiles: Tensor
    units: Tensor
    features: Tensor
    bases: Tensor
    strides: Tensor
    chunk_walks: int
    longest: int
    feature_grain: int
    unit_grain: int
    weight_grain: int

    @property
    def num_tiles(self) -> int:
        """Tiles in all."""
        return self.tiles.shape[0]

    @property
    def num_slots(self) -> int:
        """Slots of partial sums that split tiles need."""
        return int(self.parts.shape[0] - self.num_tiles + self.splits.shape[0])

    def split(self, longest: int) -> Tiles:
        """The same with tiles of more than ``longest`` chunks cut into parts of equal length."""
        parts, splits = parts_of(self.tiles.numpy(), longest)
        return replace(self, parts=torch.from_numpy(parts), splits=torch.from_numpy(splits))

    def to(self, device: torch.device) -> Tiles:
        """The same tables on ``device``."""
        return moved(self, device)

    def weight_items(self, features: int) -> Tensor:
        """Work of the weight gradient: ``(items, 4)`` int32, longest tiles first.

        An item is ``features`` consecutive entries of a tile's feature table: tile, first entry,
        last entry of the tile + 1, and whether it is the tile's first (which sums the bias).
        """
        items = []
        for tile, (_, _, first, last) in enumerate(self.tiles.tolist()):
            start, end = first * self.depth, last * self.depth
            while end > start and self.features.view(-1)[end - 1] < 0:
                end -= 1
            items += [
                (tile, at, end, int(at == start))
                for at in range(start, max(end, start + 1), features)
            ]
        return torch.tensor(items, dtype=torch.int32).view(-1, 4)


def moved(tables: _Tables, device: torch.device) -> _Tables:
    """``tables`` with all its tensors on ``device``."""
    tensors = {
        f.name: getattr(tables, f.name).to(device)
        for f in fields(tables)
        if isinstance(getattr(tables, f.name), Tensor)
    }
    return replace(tables, **tensors)


def cut(layout: BlockLayout, lanes: int, depth: int) -> Tiles:
    """Tiles of ``layout``.

    Args:
        layout: Its rows are the units, its columns the features.
        lanes: Units of a tile, a power of two of at least 16.
        depth: Features of a chunk, a power of two of at least 16.
    """
    found = list(groups(layout, lanes))
    cutter = _Cutter(layout, lanes, depth, shared=any(len(group) > 1 for group in found))
    for group in found:
        cutter.add(np.array(group))
    tiles = np.array(cutter.tiles, dtype=np.int32).reshape(-1, 4)
    units = _stacked(cutter.units, lanes)
    chunks = _stacked(cutter.features, depth)
    bases = _stacked(cutter.bases, lanes)
    strides = _stacked(cutter.strides, lanes)
    parts, splits = parts_of(tiles, None)
    return Tiles(
        lanes,
        depth,
        cutter.shared,
        torch.from_numpy(parts),
        torch.from_numpy(splits),
        torch.from_numpy(tiles),
        torch.from_numpy(units),
        torch.from_numpy(chunks),
        torch.from_numpy(bases),
        torch.from_numpy(strides),
        chunk_walks=int((tiles[:, 3] - tiles[:, 2]).sum()),
        longest=int((tiles[:, 3] - tiles[:, 2]).max()),
        feature_grain=grain_of(chunks),
        unit_grain=grain_of(units),
        weight_grain=_lane_grain(bases, strides) if cutter.shared else _divisor(tiles[:, :2]),
    )


def groups(layout: BlockLayout, lanes: int) -> Iterator[list[int]]:
    """Row blocks by tile: wide ones alone, the others in the company that reads most alike."""
    all_sizes = np.array(layout.row_sizes)
    small = np.flatnonzero(2 * all_sizes <= lanes)
    yield from ([i] for i in np.flatnonzero(2 * all_sizes > lanes).tolist())
    sizes = all_sizes[small]
    reads = layout.present.numpy()[small] * np.array(layout.col_sizes, dtype=np.float32)
    readers = np.ascontiguousarray(reads.T)
    fan_in = reads.sum(1)
    left = np.ones(len(small), dtype=bool)
    for member in np.argsort(-fan_in, kind="stable").tolist():
        if not left[member]:
            continue
        group, free = [member], lanes - sizes[member]
        left[member] = False
        union = reads[member] > 0
        common = reads @ union.astype(np.float32)
        # The one that adds the fewest features comes next; among those, the one that reads most.
        while (fits := np.flatnonzero(left & (sizes <= free))).size:
            added = (fan_in - common if len(small) <= _MANY else -fan_in)[fits]
            member = int(fits[np.lexsort((-fan_in[fits], added))[0]])
            group.append(member)
            free -= sizes[member]
            left[member] = False
            new = (reads[member] > 0) & ~union
            common += readers[new].sum(0)
            union |= new
        yield sorted(small[group].tolist())


class _Cutter:
    """Collects the tables, tile by tile."""

    def __init__(self, layout: BlockLayout, lanes: int, depth: int, shared: bool) -> None:
        self.lanes, self.depth, self.shared = lanes, depth, shared
        self.present = layout.present.numpy()
        self.row_sizes, self.col_sizes = np.array(layout.row_sizes), np.array(layout.col_sizes)
        self.row_offsets, self.col_offsets = layout.row_offsets, np.array(layout.col_offsets)
        self.weights = np.array(layout.weight_offsets)
        seen = self.present * self.col_sizes
        #: Where each column block starts in the packed (fan-in, units) matrix of each row block.
        self.starts = seen.cumsum(1) - seen
        self.row_order = order_of(layout.row_order, layout.out_features)
        self.col_order = order_of(layout.col_order, layout.in_features)
        self.num_chunks = 0
        self.tiles: list[tuple[int, int, int, int]] = []
        self.units: list[np.ndarray] = []
        self.features: list[np.ndarray] = []
        self.bases: list[np.ndarray] = []
        self.strides: list[np.ndarray] = []

    def add(self, members: np.ndarray) -> None:
        """The tile of some row blocks, or the tiles of a wide one."""
        columns, run_of, chunks_of = self._chunks(members)
        first, last = self.num_chunks - int(chunks_of.sum()), self.num_chunks
        width = int(self.row_sizes[members].sum())
        for lane in range(0, width, self.lanes):
            if self.shared and lane:  # bases differ, so these chunks stand once more
                self._chunks(members)
                first, last = last, self.num_chunks
            plain = (self.weights[members[0]] + lane, self.row_sizes[members[0]])
            self.tiles.append((*((0, 0) if self.shared else plain), first, last))
            units = np.concatenate(
                [self.row_order[self.row_offsets[i] : self.row_offsets[i + 1]] for i in members]
            )[lane : lane + self.lanes]
            self.units.append(_padded(units, self.lanes))
            if self.shared:
                heads = columns[np.flatnonzero(np.diff(run_of, prepend=-1))]
                self._lanes(members, heads, chunks_of, lane)

    def _chunks(self, members: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The features of a tile in chunks, each of a run of columns that the same members read.

        Between two columns of a run no member reads another one, so that a run's weights lie one
        after another for each of them.

        Returns:
            The column blocks that somebody reads, the run of each, the chunks of each run.
        """
        reads = self.present[members]
        columns = np.flatnonzero(reads.any(0))
        seen = reads[:, columns]
        run_of = np.cumsum((seen[:, 1:] != seen[:, :-1]).any(0)) if columns.size else columns
        run_of = np.concatenate([[0], run_of]) if columns.size else columns
        sizes = self.col_sizes[columns]
        lengths = np.bincount(run_of, sizes).astype(np.int64) if columns.size else columns
        chunks_of = -(-lengths // self.depth)
        total = int(sizes.sum())
        within = np.arange(total) - np.repeat(sizes.cumsum() - sizes, sizes)
        feature = self.col_order[np.repeat(self.col_offsets[columns], sizes) + within]
        in_run = np.arange(total) - np.repeat(lengths.cumsum() - lengths, lengths)
        table = np.tile(np.arange(-self.depth, 0), int(chunks_of.sum()))
        table[np.repeat((chunks_of.cumsum() - chunks_of) * self.depth, lengths) + in_run] = feature
        self.features.append(table)
        self.num_chunks += int(chunks_of.sum())
        return columns, run_of, chunks_of

    def _lanes(
        self, members: np.ndarray, heads: np.ndarray, chunks_of: np.ndarray, lane: int
    ) -> None:
        """Where each lane's weights for each chunk start; ``heads`` are the runs' first columns."""
        sizes = self.row_sizes[members]
        member = np.repeat(np.arange(len(members)), sizes)[lane : lane + self.lanes]
        unit = np.concatenate([np.arange(n) for n in sizes])[lane : lane + self.lanes]
        run = np.repeat(np.arange(len(heads)), chunks_of)
        done = np.arange(len(run)) - np.repeat(chunks_of.cumsum() - chunks_of, chunks_of)
        row = self.starts[members][:, heads][:, run] + done * self.depth
        base = self.weights[members][:, None] + row * sizes[:, None]
        base = np.where(self.present[members][:, heads][:, run], base, -1)[member]
        base = np.where(base < 0, -1, base + unit[:, None]).T
        table = np.full((len(run), self.lanes), -1)
        table[:, : len(member)] = base
        self.bases.append(table)
        self.strides.append(np.pad(sizes[member], (0, self.lanes - len(member))))


def order_of(order: Tensor | None, size: int) -> np.ndarray:
    """A layout's order of units or features; ``None`` is as they come."""
    return np.arange(size) if order is None else order.numpy()


def _stacked(tables: list[np.ndarray], width: int) -> np.ndarray:
    if not tables:
        return np.zeros((0, width), dtype=np.int32)
    return np.concatenate([t.reshape(-1, width) for t in tables]).astype(np.int32)


def parts_of(tiles: np.ndarray, longest: int | None) -> tuple[np.ndarray, np.ndarray]:
    """``parts`` and ``splits`` of :class:`Tiles`, with parts of at most ``longest`` chunks."""
    parts: list[tuple[int, int, int, int]] = []
    splits: list[tuple[int, int, int]] = []
    slot = 0
    for tile, (_, _, first, last) in enumerate(tiles.tolist()):
        count = 1 if longest is None else max(1, -(-(last - first) // longest))
        if count == 1:
            parts.append((tile, first, last, -1))
            continue
        cuts = [first + (last - first) * k // count for k in range(count + 1)]
        parts += [(tile, cuts[k], cuts[k + 1], slot + k) for k in range(count)]
        splits.append((tile, slot, slot + count))
        slot += count
    parts.sort(key=lambda part: part[1] - part[2])  # stable: equal ones stay in order
    return (
        np.array(parts, dtype=np.int32).reshape(-1, 4),
        np.array(splits, dtype=np.int32).reshape(-1, 3),
    )


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    # Aligned runs stay runs through the padding: ..., -2, -1.
    return np.concatenate([values, np.arange(len(values) - size, 0)])


def grain_of(table: np.ndarray, absent: int | None = None) -> int:
    """The longest aligned runs of neighbours, of 16 entries at most, in all rows of ``table``."""
    for grain in _GRAINS:
        groups = table.reshape(-1, grain)
        present = groups[(groups != absent).any(1)]
        if not (present[:, :1] % grain).any() and (np.diff(present) == 1).all():
            return grain
    return 1


def _divisor(table: np.ndarray) -> int:
    return next((grain for grain in _GRAINS if not (table % grain).any()), 1)


def _lane_grain(bases: np.ndarray, strides: np.ndarray) -> int:
    for grain in _GRAINS:
        groups = strides.reshape(-1, grain)
        if grain <= min(grain_of(bases, -1), _divisor(strides)) and not np.diff(groups).any():
            return grain
    return 1
