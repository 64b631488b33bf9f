"""A layout as one integer tensor: what a registered op is given, on any device, and can rebuild.

Plan, int64, one dimension::

    version, R, C, has_row_order, has_col_order,
    row_sizes (R), col_sizes (C), present (R * C bits), routes_grad (R * C bits),
    row_order (out), col_order (in)

Bits are packed 32 to an entry, lowest first. A plan is built once per layout and device and
found again by the layout's id, so no call reads it back from a device; only a program loaded in
a fresh process decodes it, once.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from maskmoe_kernels.errors import BackendError, LayoutError
from maskmoe_kernels.layout.blocks import BlockLayout

PLAN_VERSION = 1
_HEADER = 5
_WORD = 32

_known: WeakValueDictionary[int, BlockLayout] = WeakValueDictionary()
_decoded: dict[int, BlockLayout] = {}


def plan_of(layout: BlockLayout, device: torch.device) -> Tensor:
    """The plan of ``layout`` on ``device``; builds it on first use and registers the layout."""
    key = ("plan", device)
    plan = layout._tables.get(key)
    if plan is None:
        if torch.compiler.is_dynamo_compiling():
            raise BackendError(
                "torch.compile cannot build the plan of a layout; call masked_linear once on this "
                "device before compiling it (MaskedLinear has its plan from the start)"
            )
        # Equal layouts keep the registered one alive: its id has to be known as long as any of
        # them has a plan, or a call would read a plan back from its device.
        registered = _known.setdefault(layout.id, layout)
        if registered is not layout:  # a layout that held itself would wait for the collector
            layout._registered = registered
        plan = layout.table("plan", device, lambda: encode(layout))
    return plan


def layout_of(layout_id: int, plan: Tensor) -> BlockLayout:
    """The layout with ``layout_id``; decoded from ``plan`` if this process has not met it."""
    layout = _known.get(layout_id)
    if layout is None:
        layout = decode(plan)
        if layout.id != layout_id:
            raise LayoutError(
                f"plan describes layout {layout.id}, but the call names {layout_id}; pass a plan "
                "from plan_of(layout, device)"
            )
        _known[layout_id] = _decoded[layout_id] = layout
    return layout


def encode(layout: BlockLayout) -> Tensor:
    """``layout`` as a plan on the CPU."""
    orders = [order for order in (layout.row_order, layout.col_order) if order is not None]
    header = [
        PLAN_VERSION,
        len(layout.row_sizes),
        len(layout.col_sizes),
        int(layout.row_order is not None),
        int(layout.col_order is not None),
    ]
    parts = [
        torch.tensor([*header, *layout.row_sizes, *layout.col_sizes], device="cpu"),
        _words(layout.present),
        _words(layout.routes_grad),
        *orders,
    ]
    return torch.cat(parts)


def decode(plan: Tensor) -> BlockLayout:
    """The layout that ``plan`` was built from.

    Raises:
        LayoutError: Not a plan, or one of another version.
    """
    values = plan.detach().cpu()
    if values.dim() != 1 or values.dtype != torch.int64 or values.numel() < _HEADER:
        raise LayoutError(
            f"plan must be a one-dimensional int64 tensor, got {values.dtype} {tuple(values.shape)}"
        )
    version, rows, cols, has_row_order, has_col_order = values[:_HEADER].tolist()
    if version != PLAN_VERSION:
        raise LayoutError(
            f"plan has version {version}, this library reads version {PLAN_VERSION}; export again"
        )
    row_sizes, col_sizes = values[_HEADER : _HEADER + rows + cols].split([rows, cols])
    words = -(-rows * cols // _WORD)
    sizes = [
        _HEADER + rows + cols,
        words,
        words,
        int(row_sizes.sum()) * has_row_order,
        int(col_sizes.sum()) * has_col_order,
    ]
    if sum(sizes) != values.numel():
        raise LayoutError(f"plan should hold {sum(sizes)} entries, it holds {values.numel()}")
    _, present, routes, row_order, col_order = values.split(sizes)
    return BlockLayout(
        row_sizes.tolist(),
        col_sizes.tolist(),
        _bits(present, rows, cols),
        _bits(routes, rows, cols),
        row_order=row_order if has_row_order else None,
        col_order=col_order if has_col_order else None,
    )


def transposed(layout: BlockLayout) -> tuple[BlockLayout, Tensor]:
    """The map that grad_x walks: routed blocks only, rows and columns exchanged.

    Returns:
        The layout, and for each of its packed weights the position in ``layout``'s packed
        weights, ``(routed weights,)`` int64.
    """
    turned = BlockLayout(
        layout.col_sizes,
        layout.row_sizes,
        layout.routes_grad.T,
        row_order=layout.col_order,
        col_order=layout.row_order,
    )
    sizes = torch.tensor(layout.col_sizes, device="cpu")
    # Where block (i, j) starts among the features that row block i sees.
    start = (layout.present * sizes).cumsum(1) - sizes
    pieces: list[Any] = []
    for j, rows in enumerate(turned.row_blocks()):
        feature = np.arange(layout.col_sizes[j])[:, None]
        for_unit = [
            layout.weight_offsets[i]
            + (int(start[i, j]) + feature) * layout.row_sizes[i]
            + np.arange(layout.row_sizes[i])
            for i in rows
        ]
        if for_unit:
            # Packed order of the turned map: its fan-in is the units, its units the features.
            pieces.append(np.concatenate(for_unit, axis=1).T.ravel())
    index = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
    return turned, torch.from_numpy(index)


def _words(blocks: Tensor) -> Tensor:
    bits = np.packbits(blocks.numpy().ravel(), bitorder="little")
    padded = np.zeros(-(-blocks.numel() // _WORD) * (_WORD // 8), dtype=np.uint8)
    padded[: bits.size] = bits
    return torch.from_numpy(padded.view("<u4").astype(np.int64))


def _bits(words: Tensor, rows: int, cols: int) -> Tensor:
    stored = words.numpy().astype("<u4").view(np.uint8)
    bits = np.unpackbits(stored, count=rows * cols, bitorder="little")
    return torch.from_numpy(bits.astype(np.bool_).reshape(rows, cols))
