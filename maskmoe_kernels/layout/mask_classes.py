"""The blocks of a boolean mask: classes of units that see the same, of features seen alike."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.arguments import plain_tensor, refuse_absent_routes

Bools = np.ndarray[Any, np.dtype[np.bool_]]

# Units that a kernel computes together.
PANEL = 16
# What it costs to gather or scatter one unit, and more for a step with a mask, in steps of a panel.
STEPS_PER_MOVE = 1.5
STEPS_PER_MASK = 1.5


class MaskClasses(NamedTuple):
    """A mask as the arguments of a :class:`BlockLayout`."""

    row_sizes: list[int]
    col_sizes: list[int]
    present: Tensor
    routes_grad: Tensor | None
    row_order: Tensor | None
    col_order: Tensor | None


def mask_classes(mask: Tensor, grad_mask: Tensor | None) -> MaskClasses:
    """The classes of ``mask`` ``(out, in)``, those of ``grad_mask`` told apart.

    Raises:
        LayoutError: See :meth:`BlockLayout.from_mask`.
    """
    seen = _mask_array("mask", mask)
    routed = seen if grad_mask is None else _mask_array("grad_mask", grad_mask)
    if routed.shape != seen.shape:
        raise LayoutError(
            f"grad_mask must have the shape of mask, {seen.shape}, got {routed.shape}"
        )
    if routed is not seen:
        refuse_absent_routes(torch.from_numpy(routed), torch.from_numpy(seen), "entry")
    masks = [seen] if routed is seen else [seen, routed]
    row_class, row_order = _classes(
        np.concatenate([np.packbits(m, axis=1) for m in masks], axis=1), seen.sum(1)
    )
    col_class, col_order = _classes(
        np.concatenate([np.packbits(_transposed(m), axis=1) for m in masks], axis=1), seen.sum(0)
    )
    rows = [int(members[0]) for members in row_class]
    cols = [int(members[0]) for members in col_class]
    return MaskClasses(
        [len(members) for members in row_class],
        [len(members) for members in col_class],
        torch.from_numpy(_pick(seen, rows, cols)),
        None if routed is seen else torch.from_numpy(_pick(routed, rows, cols)),
        row_order,
        col_order,
    )


def _mask_array(argument: str, mask: Tensor) -> Bools:
    array = plain_tensor(argument, mask)
    if array.dim() != 2 or 0 in array.shape:
        raise LayoutError(
            f"{argument} must be (out, in) with at least one row and one column, got "
            f"{tuple(array.shape)}"
        )
    if array.dtype != torch.bool:
        if not ((array == 0) | (array == 1)).all():
            raise LayoutError(f"{argument} must hold booleans or zeros and ones")
        array = array.bool()
    return array.contiguous().numpy()


def _transposed(mask: Bools) -> Bools:
    return torch.from_numpy(mask).t().contiguous().numpy()  # torch transposes in blocks: 20x


def _pick(mask: Bools, rows: list[int], cols: list[int]) -> Bools:
    return mask if len(rows) * len(cols) == mask.size else mask[np.ix_(rows, cols)]


def _classes(
    signatures: np.ndarray[Any, np.dtype[np.uint8]], visible: np.ndarray[Any, Any]
) -> tuple[list[np.ndarray[Any, np.dtype[np.int64]]], Tensor | None]:
    """Members of each class of equal signatures, and the order that puts them side by side.

    Args:
        signatures: ``(units, bytes)``; equal rows are one class.
        visible: Number of true entries of each unit, ``(units,)``.
    """
    numbers: dict[bytes, int] = {}
    label = np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in signatures])
    starts = np.flatnonzero(np.r_[True, label[1:] != label[:-1]])
    together = len(starts) <= 2 * len(numbers)
    if together and len(label) >= PANEL * len(numbers):
        # Equal neighbours already form few blocks: no unit has to move.
        return np.split(np.arange(len(label)), starts[1:]), None
    members = np.split(np.argsort(label, kind="stable"), np.cumsum(np.bincount(label))[:-1])
    # Widest first: where masks are nested (MADE), each unit then sees one run of features.
    members.sort(key=lambda units: (-int(visible[units[0]]), int(units[0])))
    order = np.concatenate(members)
    if not together:
        return members, torch.from_numpy(order)
    # Fine blocks: a sorted order pays if panels walk so much less that it is worth a gather.
    before, after = (
        walked + STEPS_PER_MASK * masked
        for walked, masked in map(panel_steps, (signatures, signatures[order]))
    )
    if before - after > max(STEPS_PER_MOVE * len(label), before / 10):
        return members, torch.from_numpy(order)
    return np.split(np.arange(len(label)), starts[1:]), None


def panel_steps(signatures: np.ndarray[Any, np.dtype[np.uint8]]) -> tuple[int, int]:
    """Inputs that panels of neighbouring units walk, and those of them that need a mask.

    A panel walks what any of its units sees; a mask keeps it from those that do not see it.

    Args:
        signatures: ``(units, bytes)``, a bit an input.
    """
    padded = np.pad(signatures, ((0, -len(signatures) % PANEL), (0, 0)), mode="edge")
    panels = padded.reshape(-1, PANEL, signatures.shape[1])
    walked, common = (
        int(np.unpackbits(reduce(panels, axis=1)).sum())
        for reduce in (np.bitwise_or.reduce, np.bitwise_and.reduce)
    )
    return walked, walked - common
