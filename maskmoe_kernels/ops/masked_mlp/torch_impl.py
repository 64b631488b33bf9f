"""A masked MLP layer after layer: gather the input, then call the fastest op for each layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.serialized import layout_of
from maskmoe_kernels.ops.activations import NEEDS_INPUT
from maskmoe_kernels.ops.checks import check_count
from maskmoe_kernels.ops.dispatch import choose
from maskmoe_kernels.ops.masked_linear.api import OP_OF
from maskmoe_kernels.ops.masked_linear.schema import BACKWARD, FORWARD
from maskmoe_kernels.ops.masked_mlp.checks import check_arguments


def gather(
    x: Tensor | None, tables: Sequence[Tensor], ids: Sequence[Tensor], parts: Sequence[int]
) -> Tensor:
    """The parts of an input side by side, ``(*, in_features)``; see :class:`Inputs`."""
    columns, start = [], 0
    for part in parts:
        if part >= 0:
            columns.append(_rows(tables[part], ids[part]))
        elif x is not None:
            columns.append(x[..., start : start - part])
            start -= part
    return columns[0] if len(columns) == 1 else torch.cat(columns, -1)


def _rows(table: Tensor, ids: Tensor) -> Tensor:
    """Rows of ``table`` at ``ids`` ``(*,)``, ``(*, width)``, with a deterministic gradient.

    The backward of indexing adds in any order on the CPU, that of ``index_select`` on a GPU.
    """
    if ids.is_cuda:
        return F.embedding(ids, table)
    return table.index_select(0, ids.reshape(-1)).view(*ids.shape, table.shape[1])


def _grad_table(grad: Tensor, ids: Tensor, count: int) -> Tensor:
    """The gradient of a table of ``count`` rows from that of :func:`_rows`, added in one order."""
    if ids.is_cuda:
        summed: Tensor = torch.ops.aten.embedding_dense_backward(grad, ids, count, -1, False)
        return summed
    flat = grad.reshape(-1, grad.shape[-1])
    return grad.new_zeros(count, flat.shape[1]).index_add_(0, ids.reshape(-1), flat)


def forward(
    x: Tensor | None,
    tables: list[Tensor],
    ids: list[Tensor],
    parts: list[int],
    weights: list[Tensor],
    biases: list[Tensor],
    serialized: list[Tensor],
    layouts: list[int],
    out_features: int,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Logits ``(*, out_features)``, and an empty tensor: backward computes activations again."""
    check_arguments(x, tables, ids, parts, weights, biases, len(layouts))
    with torch.no_grad():
        h = gather(x, tables, ids, parts)
        logits = _layers(h, weights, biases, serialized, layouts, activation)[0][-1]
    check_count("out_features", out_features, logits.shape[-1])
    return logits, logits.new_empty((0, 0), dtype=torch.float32)


def backward(
    grad_logits: Tensor,
    x: Tensor | None,
    tables: list[Tensor],
    ids: list[Tensor],
    parts: list[int],
    weights: list[Tensor],
    biases: list[Tensor],
    saved: Tensor,
    serialized: list[Tensor],
    layouts: list[int],
    activation: str,
    need_x: bool,
    need_tables: bool,
    need_weights: bool,
) -> list[Tensor]:
    """Gradients of what is needed: x, then the tables, then the weights and the biases."""
    check_arguments(x, tables, ids, parts, weights, biases, len(layouts))
    h = gather(x, tables, ids, parts)
    outputs, saved_by_layer = _layers(h, weights, biases, serialized, layouts, activation)
    grad, last = grad_logits, len(layouts) - 1
    grads: list[tuple[Tensor, Tensor]] = []
    for k in reversed(range(len(layouts))):
        op = _linear_op(outputs[k], layout_of(layouts[k], serialized[k]))
        grad, *of_layer = BACKWARD[op](
            grad, outputs[k], weights[k], saved_by_layer[k], serialized[k], layouts[k],
            "none" if k == last else activation, k > 0 or need_x or need_tables, need_weights,
            need_weights and bool(biases),
        )  # fmt: skip
        grads.insert(0, (of_layer[0], of_layer[1]))
    result = grad_inputs(grad, x, tables, ids, parts, need_x, need_tables)
    if need_weights:
        result += [weight for weight, _ in grads]
        result += [bias for _, bias in grads] if biases else []
    return result


def _layers(
    h: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    serialized: Sequence[Tensor],
    layouts: Sequence[int],
    activation: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """The input of every layer and the logits; and what the derivative of each layer needs."""
    outputs, saved = [h], []
    last = len(layouts) - 1
    for k, (weight, content, layout) in enumerate(zip(weights, serialized, layouts, strict=True)):
        act = "none" if k == last else activation
        of = layout_of(layout, content)
        y, z = FORWARD[_linear_op(outputs[-1], of)](
            outputs[-1], weight, biases[k] if biases else None, content, layout, of.out_features,
            act, True,
        )  # fmt: skip
        outputs.append(y)
        saved.append(z if act in NEEDS_INPUT or act == "none" else y)
    return outputs, saved


def _linear_op(x: Tensor, layout: BlockLayout) -> str:
    """The op that runs a layer: kernels refuse some dtypes and layouts."""
    return OP_OF[choose("masked_linear", None, layout, (x,))]


def grad_inputs(
    grad: Tensor,
    x: Tensor | None,
    tables: list[Tensor],
    ids: list[Tensor],
    parts: list[int],
    need_x: bool,
    need_tables: bool,
) -> list[Tensor]:
    """Gradients of x and of each table, as needed, from that of the gathered input."""
    if not need_x and not need_tables:
        return []
    widths = [-part if part < 0 else tables[part].shape[1] for part in parts]
    of_x = [grad.narrow(-1, 0, 0)]
    of_table: dict[int, Tensor] = {}
    for part, columns in zip(parts, grad.split_with_sizes(widths, -1), strict=True):
        if part < 0:
            of_x.append(columns)
        elif need_tables:
            of_table[part] = _grad_table(columns, ids[part], len(tables[part]))
    of_tables = [
        of_table[t] if t in of_table else torch.zeros_like(table) for t, table in enumerate(tables)
    ]
    return [torch.cat(of_x, -1)] * (need_x and x is not None) + of_tables * need_tables
