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
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from maskmoe_kernels.layout.blocks import BlockLayout

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
        parts, splits = _parts(self.tiles.numpy(), longest)
        return replace(self, parts=torch.from_numpy(parts), splits=torch.from_numpy(splits))

    def to(self, device: torch.device) -> Tiles:
        """The same tables on ``device``."""
        moved = {
            f.name: getattr(self, f.name).to(device)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

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


@dataclass(frozen=True)
class _Row:
    """One row block.

    ``blocks`` holds, for each column block that it reads, the place among them and the first row
    of the packed (fan-in, units) matrix, which starts at ``weight``.
    """

    units: np.ndarray
    weight: int
    blocks: dict[int, tuple[int, int]]


def cut(layout: BlockLayout, lanes: int, depth: int) -> Tiles:
    """Tiles of ``layout``.

    Args:
        layout: Its rows are the units, its columns the features.
        lanes: Units of a tile, a power of two of at least 16.
        depth: Features of a chunk, a power of two of at least 16.
    """
    rows = _rows(layout)
    features = _columns(layout)
    groups = list(_groups(layout, rows, lanes))
    shared = any(len(group) > 1 for group in groups)
    builder = _Shared(lanes, depth) if shared else _Plain(lanes, depth)
    for group in groups:
        builder.add([rows[i] for i in group], features)
    tiles = np.array(builder.tiles, dtype=np.int32).reshape(-1, 4)
    units = np.array(builder.units, dtype=np.int32).reshape(-1, lanes)
    chunks = np.array(builder.features, dtype=np.int32).reshape(-1, depth)
    parts, splits = _parts(tiles, None)
    bases = np.array(builder.bases, dtype=np.int32).reshape(-1, lanes)
    strides = np.array(builder.strides, dtype=np.int32).reshape(-1, lanes)
    return Tiles(
        lanes,
        depth,
        shared,
        torch.from_numpy(parts),
        torch.from_numpy(splits),
        torch.from_numpy(tiles),
        torch.from_numpy(units),
        torch.from_numpy(chunks),
        torch.from_numpy(bases),
        torch.from_numpy(strides),
        chunk_walks=int((tiles[:, 3] - tiles[:, 2]).sum()),
        longest=int((tiles[:, 3] - tiles[:, 2]).max()),
        feature_grain=_grain(chunks),
        unit_grain=_grain(units),
        weight_grain=_lane_grain(bases, strides) if shared else _divisor(tiles[:, :2]),
    )


def _columns(layout: BlockLayout) -> list[np.ndarray]:
    order = np.arange(layout.in_features) if layout.col_order is None else layout.col_order.numpy()
    return np.split(order, layout.col_offsets[1:-1])


def _rows(layout: BlockLayout) -> list[_Row]:
    order = np.arange(layout.out_features) if layout.row_order is None else layout.row_order.numpy()
    rows = []
    for i, blocks in enumerate(layout.row_blocks()):
        starts = accumulate((layout.col_sizes[j] for j in blocks), initial=0)
        seen = {
            j: (place, start) for place, (j, start) in enumerate(zip(blocks, starts, strict=False))
        }
        first, last = layout.row_offsets[i : i + 2]
        rows.append(_Row(order[first:last], layout.weight_offsets[i], seen))
    return rows


def _groups(layout: BlockLayout, rows: list[_Row], lanes: int) -> Iterator[list[int]]:
    """Row blocks by tile: wide ones alone, the others in the company that reads most alike."""
    small = [i for i, row in enumerate(rows) if 2 * len(row.units) <= lanes]
    yield from ([i] for i, row in enumerate(rows) if 2 * len(row.units) > lanes)
    if not small:
        return
    sizes = np.array(layout.row_sizes)[small]
    reads = layout.present.numpy()[small].astype(np.float32)
    reads *= np.array(layout.col_sizes, dtype=np.float32)
    fan_in = reads.sum(1)
    left = np.ones(len(small), dtype=bool)
    queue = iter(np.argsort(-fan_in, kind="stable"))
    while left.any():
        member = next(k for k in queue if left[k])
        group, free = [small[member]], lanes - sizes[member]
        left[member] = False
        union = reads[member] > 0
        while True:
            fits = left & (sizes <= free)
            if not fits.any():
                break
            # The one that adds the fewest features; among those, the one that reads the most.
            added = fan_in - reads @ union if len(small) <= _MANY else -fan_in
            member = int(np.lexsort((-fan_in, np.where(fits, added, np.inf)))[0])
            group.append(small[member])
            free -= sizes[member]
            left[member] = False
            union |= reads[member] > 0
        yield sorted(group)


class _Plain:
    """Tiles of one row block each: the weights of its chunks lie one after another."""

    def __init__(self, lanes: int, depth: int) -> None:
        self.lanes, self.depth = lanes, depth
        self.tiles: list[tuple[int, int, int, int]] = []
        self.units: list[np.ndarray] = []
        self.features: list[np.ndarray] = []
        self.bases: list[np.ndarray] = []
        self.strides: list[np.ndarray] = []

    def add(self, group: list[_Row], columns: list[np.ndarray]) -> None:
        (row,) = group
        first = len(self.features)
        self._chunk([columns[j] for j in row.blocks])
        width = len(row.units)
        for lane in range(0, width, self.lanes):
            self.tiles.append((row.weight + lane, width, first, len(self.features)))
            self.units.append(_padded(row.units[lane : lane + self.lanes], self.lanes))

    def _chunk(self, columns: list[np.ndarray]) -> None:
        seen = np.concatenate(columns) if columns else np.zeros(0, dtype=np.int64)
        for at in range(0, len(seen), self.depth):
            self.features.append(_padded(seen[at : at + self.depth], self.depth))


class _Shared(_Plain):
    """Tiles of several row blocks: each lane has a base a chunk and a stride of its own."""

    def add(self, group: list[_Row], columns: list[np.ndarray]) -> None:
        width = sum(len(row.units) for row in group)
        if width > self.lanes:  # a wide one among small ones
            (row,) = group
            for lane in range(0, width, self.lanes):
                self._tile([(row, lane)], columns)
        else:
            self._tile([(row, 0) for row in group], columns)

    def _tile(self, members: list[tuple[_Row, int]], columns: list[np.ndarray]) -> None:
        first = len(self.features)
        for run in _runs([row for row, _ in members]):
            before = len(self.features)
            self._chunk([columns[j] for j in run])
            for c in range(len(self.features) - before):
                bases = [
                    row.weight
                    + (row.blocks[run[0]][1] + c * self.depth) * len(row.units)
                    + np.arange(lane, min(lane + self.lanes, len(row.units)))
                    if run[0] in row.blocks
                    else np.full(min(self.lanes, len(row.units) - lane), -1)
                    for row, lane in members
                ]
                self.bases.append(_filled(np.concatenate(bases), self.lanes, -1))
        units = [row.units[lane : lane + self.lanes] for row, lane in members]
        strides = [
            np.full(len(u), len(row.units)) for u, (row, _) in zip(units, members, strict=True)
        ]
        self.tiles.append((0, 0, first, len(self.features)))
        self.units.append(_padded(np.concatenate(units), self.lanes))
        self.strides.append(_filled(np.concatenate(strides), self.lanes, 0))


def _runs(members: list[_Row]) -> list[list[int]]:
    """Column blocks that the same members read, each as neighbours in its packed weights."""
    runs: list[list[int]] = []
    expected: dict[int, int] = {}
    for j in sorted({j for row in members for j in row.blocks}):
        places = {k: row.blocks[j][0] for k, row in enumerate(members) if j in row.blocks}
        if places == expected:
            runs[-1].append(j)
        else:
            runs.append([j])
        expected = {k: place + 1 for k, place in places.items()}
    return runs


def _parts(tiles: np.ndarray, longest: int | None) -> tuple[np.ndarray, np.ndarray]:
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


def _filled(values: np.ndarray, size: int, value: int) -> np.ndarray:
    return np.concatenate([values, np.full(size - len(values), value)])


def _grain(table: np.ndarray, absent: int | None = None) -> int:
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
        if grain <= min(_grain(bases, -1), _divisor(strides)) and not np.diff(groups).any():
            return grain
    return 1
