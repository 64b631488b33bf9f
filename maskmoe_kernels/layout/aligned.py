"""Layouts of several masks whose blocks agree on the order of the units that they share.

Each layout of :meth:`BlockLayout.from_mask` chooses the order of its blocks by itself: where units
of one layer are the inputs of the next, both move them, and often the second undoes the first.
Aligned layouts agree, so that the units can pass from layer to layer in block order, unmoved.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskmoe_kernels.layout.blocks import BlockLayout

#: More runs of equal units than this times their classes: the other layout's order does not suit.
MOST_RUNS = 2


class Place(NamedTuple):
    """Between which widths of a network a layer stands, by number; 0: what it takes and returns."""

    reads: int
    writes: int


class Inner(NamedTuple):
    """A layer on units in block order.

    Attributes:
        layout: The same blocks and the same packed weights; inputs and units that the network
            keeps to itself lie in block order.
        reads: Which order its inputs are in; ``None``: their own.
        writes: The same of its units.
    """

    layout: BlockLayout
    reads: str | None
    writes: str | None


class Aligned(NamedTuple):
    """A layout, and the same inside its network, if it is in one."""

    layout: BlockLayout
    inner: Inner | None


def aligned_layouts(masks: Sequence[Tensor], places: Sequence[Place]) -> list[Aligned] | None:
    """Layouts of ``masks``, ``(out, in)`` each, whose blocks agree on each width but 0.

    The first layer that writes a width decides on its order; the others, on that of units which are
    equal to it. ``None``: an order would cut the blocks of another layer to pieces.

    Args:
        masks: Of the layers, in the order in which they run.
        places: Of each layer.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # who converts says what does not gain
        layouts = [BlockLayout.from_mask(mask.detach()) for mask in masks]
    blocks: dict[int, list[Tensor]] = {}
    for layout, place in zip(layouts, places, strict=True):
        blocks.setdefault(place.reads, []).append(_block_of(layout.col_sizes, layout.col_order))
        blocks.setdefault(place.writes, []).append(_block_of(layout.row_sizes, layout.row_order))
    orders = {
        width: torch.from_numpy(np.lexsort([block.numpy() for block in reversed(of)]))
        for width, of in blocks.items()
        if width
    }
    aligned = []
    for layout, place in zip(layouts, places, strict=True):
        found = _with_columns(layout, orders[place.reads]) if place.reads else layout
        if place.writes and found is not None:
            found = _with_rows(found, orders[place.writes])
        if found is None:
            return None
        aligned.append(Aligned(found, _inner(found, place)))
    return aligned


def _inner(layout: BlockLayout, place: Place) -> Inner:
    """``layout`` between units in block order."""
    inner = BlockLayout(
        layout.row_sizes,
        layout.col_sizes,
        layout.present,
        layout.routes_grad,
        row_order=None if place.writes else layout.row_order,
        col_order=None if place.reads else layout.col_order,
    )
    return Inner(
        layout if inner == layout else inner,
        _digest(layout.col_order, layout.in_features) if place.reads else None,
        _digest(layout.row_order, layout.out_features) if place.writes else None,
    )


def _order(order: Tensor | None, size: int) -> Tensor:
    return torch.arange(size, device="cpu") if order is None else order


def _digest(order: Tensor | None, size: int) -> str:
    content = _order(order, size).numpy().tobytes()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _with_columns(layout: BlockLayout, order: Tensor) -> BlockLayout | None:
    """The same mask, its features in ``order``; ``None`` where equal ones are scattered."""
    runs = _runs(layout.col_sizes, layout.col_order, order)
    if runs is None:
        return None
    classes, sizes = runs
    present, routes = (m[:, classes] for m in (layout.present, layout.routes_grad))
    return BlockLayout(
        layout.row_sizes, sizes, present, routes, row_order=layout.row_order, col_order=order
    )


def _with_rows(layout: BlockLayout, order: Tensor) -> BlockLayout | None:
    """The same mask, its units in ``order``; ``None`` where equal ones are scattered."""
    runs = _runs(layout.row_sizes, layout.row_order, order)
    if runs is None:
        return None
    classes, sizes = runs
    present, routes = (m[classes] for m in (layout.present, layout.routes_grad))
    return BlockLayout(
        sizes, layout.col_sizes, present, routes, row_order=order, col_order=layout.col_order
    )


def _runs(
    sizes: Sequence[int], own: Tensor | None, order: Tensor
) -> tuple[Tensor, list[int]] | None:
    """The block of each run of equal neighbours in ``order``, and the lengths of the runs."""
    runs, lengths = _block_of(sizes, own)[order].unique_consecutive(return_counts=True)
    if len(runs) > MOST_RUNS * len(sizes):
        return None
    return runs, lengths.tolist()


def _block_of(sizes: Sequence[int], order: Tensor | None) -> Tensor:
    """The block of each unit."""
    blocks = torch.arange(len(sizes), device="cpu")
    in_order = blocks.repeat_interleave(torch.tensor(sizes, device="cpu"))
    block_of = torch.empty_like(in_order)
    block_of[_order(order, len(in_order))] = in_order
    return block_of
