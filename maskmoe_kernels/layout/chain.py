"""Layouts of layers that follow each other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.arguments import check_kind, described
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.serialized import serialized_layout


class LayoutChain:
    """Layouts of which each reads the units of the one before. Immutable.

    Args:
        layouts: At least one.

    Attributes:
        layouts: The same, as a tuple.
        in_features: Width of the first layer's input.
        out_features: Units of the last layer.
        num_weights: Present weights of all layers.
        mismatch: Where the blocks of one layer are not those that the next reads, in words; None
            if they are the same everywhere.
        too_fine: Is one of the layouts; see :attr:`BlockLayout.too_fine`.

    Raises:
        LayoutError: No layouts, or units that are not as many as the next layer's inputs.
    """

    def __init__(self, layouts: Sequence[BlockLayout]) -> None:
        if not isinstance(layouts, Sequence) or isinstance(layouts, str):
            raise LayoutError(
                f"layouts must be a sequence of BlockLayouts, got {described(layouts)}"
            )
        if not layouts:
            raise LayoutError("layouts must hold at least one layout, got none")
        for k, layout in enumerate(layouts):
            check_kind(BlockLayout, **{f"layouts[{k}]": layout})
        self.layouts = (*layouts,)
        self.in_features = layouts[0].in_features
        self.out_features = layouts[-1].out_features
        self.num_weights = sum(layout.num_weights for layout in layouts)
        self.mismatch = _mismatch(layouts)
        self.too_fine = any(layout.too_fine for layout in layouts)
        #: (backend, dtype, device) of a call: why no kernels run it, or None; see ops/dispatch.py.
        self.dispatch_cache: dict[tuple[str | None, torch.dtype, torch.device], str | None] = {}
        #: What training takes on a GPU, or why it cannot run as one op there; see ops/dispatch.py.
        self.gpu_bytes: tuple[int, int] | str | None = None
        self._serialized: dict[torch.device, tuple[list[Tensor], list[int]]] = {}

    def serialized(self, device: torch.device) -> tuple[list[Tensor], list[int]]:
        """The serialized layouts on ``device``, and their ids; built on first use."""
        found = self._serialized.get(device)
        if found is None:
            found = self._serialized[device] = (
                [serialized_layout(layout, device) for layout in self.layouts],
                [layout.id for layout in self.layouts],
            )
        return found

    def __len__(self) -> int:
        return len(self.layouts)

    def __deepcopy__(self, memo: dict[int, Any]) -> LayoutChain:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return LayoutChain, (self.layouts,)


def _mismatch(layouts: Sequence[BlockLayout]) -> str | None:
    mismatch = None
    for k, (before, after) in enumerate(itertools.pairwise(layouts)):
        if before.out_features != after.in_features:
            raise LayoutError(
                f"layouts[{k}] has {before.out_features} units, layouts[{k + 1}] reads "
                f"{after.in_features}; they must be as many"
            )
        if mismatch is None and not _same_blocks(before, after):
            mismatch = f"the units of layer {k} are not cut into the blocks that the next reads"
    return mismatch


def _same_blocks(before: BlockLayout, after: BlockLayout) -> bool:
    """Are the output blocks of one the input blocks of the other, in the same order?"""
    if before.row_sizes != after.col_sizes:
        return False
    units, features = before.row_order, after.col_order
    if units is None or features is None:
        return units is features
    return torch.equal(units, features)
