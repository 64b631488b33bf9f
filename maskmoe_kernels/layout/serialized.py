"""A layout as one integer tensor: what a registered op is given, on any device, and can rebuild.

A serialized layout, int64, one dimension::

    version, R, C, has_row_order, has_col_order,
    row_sizes (R), col_sizes (C), present (R * C bits), routes_grad (R * C bits),
    row_order (out), col_order (in)

Bits are packed 32 to an entry, lowest first. It is made once per layout and device. A call names a
layout by its id and by this tensor, and the tensor is what counts: one that was made here is known
by its identity, so that no call reads it back from a device; any other, of a loaded program say, is
read once, and refused if its content is not what the id says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakValueDictionary, finalize, ref

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from maskmoe_kernels._compat import is_fake
from maskmoe_kernels.errors import BackendError, LayoutError
from maskmoe_kernels.layout.blocks import BlockLayout

FORMAT_VERSION = 1
_HEADER = 5
_WORD = 32

#: One layout of each content that was serialized. (Two contents with one id: the first.)
_known: WeakValueDictionary[int, BlockLayout] = WeakValueDictionary()
#: What each tensor describes. One that belongs to a layout does not keep it alive; a layout that
#: was read from a tensor lives as long as that.
_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_forgets: list[Callable[[int], None]] = []


def on_forget(forget: Callable[[int], None]) -> None:
    """Have ``forget(id)`` called when nobody holds a layout with this id any more."""
    _forgets.append(forget)


def _forget(layout_id: int) -> None:
    for forget in _forgets:
        forget(layout_id)


def serialized_layout(layout: BlockLayout, device: torch.device) -> Tensor:
    """``layout`` serialized, on ``device``; equal layouts share it. It is made on first use."""
    tables, key = layout.caches.tables, ("serialized", device)
    serialized = tables.get(key)
    if serialized is None:
        if torch.compiler.is_dynamo_compiling():
            raise BackendError(
                "torch.compile cannot serialize a layout; call masked_linear once on this device "
                "before compiling it (MaskedLinear has done so from the start)"
            )
        registered = registered_layout(layout)
        if registered is not layout:
            serialized = tables[key] = serialized_layout(registered, device)
            return serialized
        serialized = layout.table("serialized", device, lambda: serialize(layout))
        _read[serialized] = ref(layout)
        finalize(layout, _forget, layout.id).atexit = False
    return serialized


def registered_layout(layout: BlockLayout) -> BlockLayout:
    """The layout that stands for all with the content of this one: caches are filled on it."""
    if layout._registered is not None:
        return layout._registered
    registered = _registered(layout)
    if registered is not layout:  # a layout that held itself would wait for the collector
        layout._registered = registered
    return registered


def _registered(layout: BlockLayout) -> BlockLayout:
    registered = _known.setdefault(layout.id, layout)
    return registered if registered == layout else layout


def layout_of(layout_id: int, serialized: Tensor) -> BlockLayout:
    """The layout that ``serialized`` describes, which has to be the one with ``layout_id``.

    Raises:
        LayoutError: Not a serialized layout, or another one.
    """
    known = _read.get(serialized)
    layout: BlockLayout | None = None if known is None else known()
    if layout is not None and layout.id == layout_id:
        return layout
    if serialized.device.type == "meta" or is_fake(serialized):
        return _unread(layout_id, serialized)
    layout = deserialize(serialized)
    if layout.id != layout_id:
        raise LayoutError(
            f"the serialized layout describes layout {layout.id}, but the call names {layout_id}; "
            "pass serialized_layout(layout, device)"
        )
    layout = _registered(layout)
    _read[serialized] = partial(_itself, layout)
    return layout


def _itself(layout: BlockLayout) -> BlockLayout:
    return layout


def _unread(layout_id: int, serialized: Tensor) -> BlockLayout:
    """The layout of a tensor that has no values: the caller computes nothing, it only counts."""
    layout = _known.get(int(layout_id))
    if layout is None or serialized.shape != serialize(layout).shape:
        raise LayoutError(
            f"layout {layout_id} is not known, and its tensor has no values to read it from; call "
            "serialized_layout(layout, device) first"
        )
    return layout


def serialize(layout: BlockLayout) -> Tensor:
    """``layout`` as a tensor on the CPU."""
    orders = [order for order in (layout.row_order, layout.col_order) if order is not None]
    header = [
        FORMAT_VERSION,
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


def deserialize(serialized: Tensor) -> BlockLayout:
    """The layout that :func:`serialize` made ``serialized`` from.

    Raises:
        LayoutError: Not a serialized layout, or one of another version.
    """
    values = serialized.detach().cpu()
    if values.dim() != 1 or values.dtype != torch.int64 or values.numel() < _HEADER:
        raise LayoutError(
            "a serialized layout must be a one-dimensional int64 tensor, got "
            f"{values.dtype} {tuple(values.shape)}"
        )
    version, rows, cols, has_row_order, has_col_order = values[:_HEADER].tolist()
    if version != FORMAT_VERSION:
        raise LayoutError(
            f"the serialized layout has version {version}, this library reads version "
            f"{FORMAT_VERSION}; export again"
        )
    if rows < 1 or cols < 1 or _HEADER + rows + cols > values.numel():
        raise LayoutError(
            f"the serialized layout names {rows} x {cols} blocks, it holds {values.numel()} entries"
        )
    row_sizes, col_sizes = (
        part.tolist() for part in values[_HEADER : _HEADER + rows + cols].split([rows, cols])
    )
    words = -(-rows * cols // _WORD)
    sizes = [
        _HEADER + rows + cols,
        words,
        words,
        sum(row_sizes) if has_row_order else 0,
        sum(col_sizes) if has_col_order else 0,
    ]
    if sum(sizes) != values.numel() or min(sizes) < 0:
        raise LayoutError(
            f"the serialized layout should hold {sum(sizes)} entries, it holds {values.numel()}"
        )
    _, present, routes, row_order, col_order = values.split(sizes)
    layout = BlockLayout(
        row_sizes,
        col_sizes,
        _bits(present, rows, cols),
        _bits(routes, rows, cols),
        row_order=row_order if has_row_order else None,
        col_order=col_order if has_col_order else None,
    )
    if not torch.equal(serialize(layout), values):
        raise LayoutError(
            "the serialized layout has bits or flags that stand for nothing; export again"
        )
    return layout


def transposed_layout(layout: BlockLayout) -> tuple[BlockLayout, Tensor]:
    """The map that grad_x walks: routed blocks only, rows and columns exchanged.

    Returns:
        The layout, and for each of its packed weights the position in ``layout``'s packed
        weights, ``(routed weights,)`` int64.
    """
    transposed = BlockLayout(
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
    for j, rows in enumerate(transposed.row_blocks()):
        feature = np.arange(layout.col_sizes[j])[:, None]
        for_unit = [
            layout.weight_offsets[i]
            + (int(start[i, j]) + feature) * layout.row_sizes[i]
            + np.arange(layout.row_sizes[i])
            for i in rows
        ]
        if for_unit:
            # Packed order of the transposed map: its fan-in is the units, its units the features.
            pieces.append(np.concatenate(for_unit, axis=1).T.ravel())
    index = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
    return transposed, torch.from_numpy(index)


def _words(blocks: Tensor) -> Tensor:
    bits = np.packbits(blocks.numpy().ravel(), bitorder="little")
    padded = np.zeros(-(-blocks.numel() // _WORD) * (_WORD // 8), dtype=np.uint8)
    padded[: bits.size] = bits
    return torch.from_numpy(padded.view("<u4").astype(np.int64))


def _bits(words: Tensor, rows: int, cols: int) -> Tensor:
    stored = words.numpy().astype("<u4").view(np.uint8)
    bits = np.unpackbits(stored, count=rows * cols, bitorder="little")
    return torch.from_numpy(bits.astype(np.bool_).reshape(rows, cols))
