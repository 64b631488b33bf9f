"""Do the tensors of a masked MLP fit each other and its layouts?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.ops.checks import PLAIN, refuse_sharded


def check_arguments(
    x: Tensor | None,
    tables: Sequence[Tensor],
    ids: Sequence[Tensor],
    parts: Sequence[int],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    num_layers: int,
) -> None:
    """Raise LayoutError unless the lists of an op's arguments fit each other.

    For ops that are called by name; the other checks are for calls of the functions in
    ``api.py``.
    """
    if not num_layers == len(weights) or len(biases) not in (0, num_layers) or not weights:
        raise LayoutError(
            f"an MLP of {num_layers} layers needs as many weights, and as many biases or none; got "
            f"{len(weights)} weights and {len(biases)} biases"
        )
    if len(ids) != len(tables) or (x is None and not ids) or (x is not None and not x.dim()):
        raise LayoutError(
            f"an MLP reads x (*, columns), or tables with an id each; got {len(tables)} tables and "
            f"{len(ids)} ids"
        )
    named = [part for part in parts if part >= 0]
    columns, given = -sum(part for part in parts if part < 0), 0 if x is None else x.shape[-1]
    missing = max(named, default=-1) >= len(tables)
    if missing or len({*named}) < len(named) or columns != given:
        raise LayoutError(
            f"parts must name every column of x once and no table twice; got {list(parts)[:9]} "
            f"for {given} columns and {len(tables)} tables"
        )
    shape = ids[0].shape if x is None else x.shape[:-1]
    for t, (table, rows) in enumerate(zip(tables, ids, strict=True)):
        if table.dim() != 2 or rows.dtype != torch.int64 or rows.shape != shape:
            raise LayoutError(
                f"tables[{t}] must be (rows, width) and its ids {tuple(shape)} int64, got "
                f"{tuple(table.shape)} and {tuple(rows.shape)} {rows.dtype}"
            )
        if rows.device.type == "cpu" and rows.numel() and int(rows.min()) < 0:
            raise LayoutError(f"ids[{t}] must be rows of its table, 0 or more, got {rows.min()}")


def check_places(
    x: Tensor | None,
    tables: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> None:
    """Raise LayoutError unless all have one dtype and device.

    Raises:
        BackendError: A weight is a DTensor and ``x`` is not.
    """
    dtype, device = weights[0].dtype, weights[0].device
    for tensor in (x, *tables, *weights, *biases):
        if tensor is not None and (tensor.dtype != dtype or tensor.device != device):
            _refuse_mixture(x, tables, weights, biases)
    for weight in weights:
        if type(weight) not in PLAIN:
            refuse_sharded(x, weight)


def check_weights(weights: Sequence[Tensor], layouts: Sequence[BlockLayout]) -> None:
    """Raise LayoutError unless each weight is packed as its layout says."""
    for layout, weight in zip(layouts, weights, strict=True):
        if weight.numel() != layout.num_weights or weight.dim() != 1:
            layout.check_weight(weight)


def _refuse_mixture(
    x: Tensor | None,
    tables: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> None:
    like = weights[0]
    named = [("x", x)] if x is not None else []
    for name, tensors in (("tables", tables), ("weights", weights), ("biases", biases)):
        named += [(f"{name}[{k}]", tensor) for k, tensor in enumerate(tensors)]
    for name, tensor in named:
        if tensor.dtype != like.dtype or tensor.device != like.device:
            raise LayoutError(
                f"{name} is {tensor.dtype} on {tensor.device} but weights[0] is {like.dtype} on "
                f"{like.device}; move all to one dtype and device"
            )


def check_inputs(
    x: Tensor | None,
    tables: Sequence[Tensor],
    ids: Sequence[Tensor],
    parts: Sequence[int],
    in_features: int | None,
) -> None:
    """Raise LayoutError unless the parts of an input have ``in_features`` columns in all.

    None for ``in_features`` leaves the number to the op.
    """
    if not tables and not ids:
        if x is None or x.dim() == 0 or in_features not in (None, x.shape[-1]):
            got = None if x is None else tuple(x.shape)
            raise LayoutError(
                f"x must be (*, in_features) with in_features={in_features}, got {got}"
            )
        return
    if sorted(part for part in parts if part >= 0) != [*range(len(tables))] or len(ids) != len(
        tables
    ):
        raise LayoutError(
            f"order must name each of {len(tables)} tables once, and each needs its ids; got "
            f"order {tuple(parts)} and {len(ids)} ids"
        )
    columns = -sum(part for part in parts if part < 0)
    given = 0 if x is None else x.shape[-1]
    widths = [tables[part].shape[1] for part in parts if part >= 0]
    if columns != given or in_features not in (None, columns + sum(widths)):
        raise LayoutError(
            f"the parts of the input must have in_features={in_features} columns in all, got "
            f"{columns} of an x with {given} and tables with {widths}"
        )
    shape = ids[0].shape if x is None else x.shape[:-1]
    for t, rows in enumerate(ids):
        if rows.dtype != torch.int64 or rows.shape != shape:
            raise LayoutError(
                f"ids[{t}] must be {tuple(shape)} int64, one row of the table for every sample, "
                f"got {tuple(rows.shape)} {rows.dtype}"
            )
