"""PyTorch alone: one matrix product per run of present blocks, absent blocks skipped.

Neighbouring present blocks of a row block form a *run*, a strided view that BLAS reads in
place; nothing is gathered and nothing unseen is multiplied. In float32 and float64 the runs of
a row accumulate in its output. In 16-bit types that would round once per run, so there a row's
runs are gathered for a single product.

Layouts whose runs are too small for that (a random mask, say) take one dense product, in which
unseen values are set aside first: a multiply by zero is not absence.

:func:`standard` is the same map for programs that leave PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from maskmoe_kernels._compat import constant_in_trace, outside_of_modes
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.serialized import transposed_layout
from maskmoe_kernels.ops.activations import FUNCTIONS, NEEDS_INPUT, grad_before

# A product call costs about as much as this many weights' share of a dense product.
WEIGHTS_PER_CALL = 100


@dataclass(frozen=True)
class _Row:
    units: int
    runs: list[tuple[int, int]]  # features [first, last) of each run
    run_sizes: list[int]


@dataclass(frozen=True)
class _Schedule:
    rows: list[_Row]
    row_sizes: list[int]
    weight_sizes: list[int]
    dense: bool


def _schedule(layout: BlockLayout) -> _Schedule:
    return layout.caches.derive("torch schedule", lambda: _build_schedule(layout))


def _build_schedule(layout: BlockLayout) -> _Schedule:
    rows = []
    for i, blocks in enumerate(layout.row_blocks()):
        runs: list[tuple[int, int]] = []
        for j in blocks:
            first, last = layout.col_offsets[j : j + 2]
            if runs and runs[-1][1] == first:
                runs[-1] = (runs[-1][0], last)
            else:
                runs.append((first, last))
        rows.append(_Row(layout.row_sizes[i], runs, [last - first for first, last in runs]))
    calls = sum(len(row.runs) for row in rows)
    sizes = [b - a for a, b in pairwise(layout.weight_offsets)]
    dense = calls * WEIGHTS_PER_CALL > layout.num_weights
    return _Schedule(rows, list(layout.row_sizes), sizes, dense)


def _transposed(layout: BlockLayout, device: torch.device) -> tuple[BlockLayout, Tensor]:
    of, index = layout.caches.derive("transposed", lambda: transposed_layout(layout))
    return of, layout.table("transposed", device, lambda: index)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: BlockLayout,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Output and, if ``keep`` and the derivative needs it, the pre-activation (else empty)."""
    z = _multiply(x.reshape(-1, layout.in_features), weight, bias, layout)
    # Not a view: the caller may change the output in place.
    z = torch.ops.aten._unsafe_view(z, [*x.shape[:-1], layout.out_features])
    if activation == "none":
        return z, z.new_empty(0)
    y = FUNCTIONS[activation](z)
    return y, z if keep and activation in NEEDS_INPUT else z.new_empty(0)


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    saved: Tensor,
    layout: BlockLayout,
    activation: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_x over routed blocks, grad_weight over present blocks, grad_bias; empty if unneeded."""
    grad_z = grad_before(grad_y, saved, activation).reshape(-1, layout.out_features)
    grad_x, grad_weight, grad_bias = (x.new_empty(0) for _ in range(3))
    if needs[0]:
        of, index = _transposed(layout, x.device)
        grad_x = _multiply(grad_z, weight.index_select(0, index), None, of).view(x.shape)
    if needs[1]:
        grad_weight = _grad_weight(grad_z, x.reshape(-1, layout.in_features), layout)
    if needs[2]:
        grad_bias = grad_z.sum(0)
    return grad_x, grad_weight, grad_bias


def standard(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: BlockLayout, activation: str
) -> Tensor:
    """The map in torch's own operators alone, for TorchScript, ONNX, and traces of the reference.

    One matrix product a row block. Unseen features are in none, so absent is absent there, too.
    Autograd derives the routed gradients, of any order: what a block without a route reads is
    detached. No table of the layout is read, which a trace could not make.
    """
    parts = []
    rows = _standard_rows(layout)
    for (units, fan_in, reads), packed in zip(
        rows, weight.split_with_sizes([u * f for u, f, _ in rows]), strict=True
    ):
        if not reads:
            parts.append(x.new_zeros(*x.shape[:-1], units))
            continue
        seen = [_features(x, of, routed) for of, routed in reads]
        joined = seen[0] if len(seen) == 1 else torch.cat(seen, -1)
        parts.append(joined @ packed.view(fan_in, units))
    z = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    if layout.row_order is not None:
        z = z.index_select(-1, _constant(_unit_ranks(layout), x.device))
    return FUNCTIONS[activation](z if bias is None else z + bias)


# Units, fan-in, and what the block reads in the order of its weights: features, and if they route.
_StandardRow = tuple[int, int, list[tuple[list[int], bool]]]


@constant_in_trace
def _standard_rows(layout: BlockLayout) -> list[_StandardRow]:
    return layout.caches.derive("standard rows", lambda: _find_standard_rows(layout))


def _find_standard_rows(layout: BlockLayout) -> list[_StandardRow]:
    order = range(layout.in_features) if layout.col_order is None else layout.col_order.tolist()
    found: list[_StandardRow] = []
    for i, blocks in enumerate(layout.row_blocks()):
        reads: list[tuple[list[int], bool]] = []
        for j in blocks:
            routed = bool(layout.routes_grad[i, j])
            if not reads or reads[-1][1] != routed:
                reads.append(([], routed))
            reads[-1][0].extend(order[layout.col_offsets[j] : layout.col_offsets[j + 1]])
        found.append((layout.row_sizes[i], layout.row_fan_in[i], reads))
    return found


@constant_in_trace
def _unit_ranks(layout: BlockLayout) -> list[int]:
    """Where each output unit lies in the block order; empty if the blocks lie in that order."""
    order = layout.row_order
    return layout.caches.derive(
        "unit ranks", lambda: [] if order is None else order.argsort().tolist()
    )


def _features(x: Tensor, features: list[int], routed: bool) -> Tensor:
    first, last = features[0], features[-1] + 1
    if features == [*range(first, last)]:
        seen = x[..., first:last]
    else:
        seen = x.index_select(-1, _constant(features, x.device))
    return seen if routed else seen.detach()


def _constant(values: list[int], device: torch.device) -> Tensor:
    if is_dynamo_compiling():
        return torch.tensor(values, device=device)
    with outside_of_modes():
        return torch.tensor(values, device=device)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, layout: BlockLayout) -> Tensor:
    """``x`` (B, in) times the packed ``weight``: (B, out)."""
    schedule = _schedule(layout)
    if schedule.dense:
        return _dense_product(x, weight, bias, layout)
    x = _ordered(x, layout, "col_order")
    y = x.new_empty(x.shape[0], layout.out_features)
    biases: Sequence[Tensor | None] = [None] * len(schedule.rows)
    if bias is not None:
        biases = _ordered(bias, layout, "row_order").split_with_sizes(schedule.row_sizes)
    # Views are made many at a time: for small layers making them costs as much as multiplying.
    rows = zip(
        schedule.rows,
        weight.split_with_sizes(schedule.weight_sizes),
        y.split_with_sizes(schedule.row_sizes, 1),
        biases,
        strict=True,
    )
    for row, packed, out, start in rows:
        if row.runs:
            _row_product(row, x, packed.view(-1, row.units), start, out)
        elif start is None:
            out.zero_()
        else:
            out.copy_(start.expand_as(out))
    if layout.row_order is None:
        return y
    rank = layout.table("row_rank", x.device, layout.row_order.argsort)
    return y.index_select(1, rank)


def _row_product(row: _Row, x: Tensor, w: Tensor, start: Tensor | None, out: Tensor) -> None:
    """``out = start + x @ w`` over the runs of one row block."""
    seen = [x[:, first:last] for first, last in row.runs]
    if len(seen) > 1 and x.dtype in (torch.bfloat16, torch.float16):
        seen = [torch.cat(seen, 1)]
    parts = [w] if len(seen) == 1 else w.split_with_sizes(row.run_sizes)
    if start is None:
        torch.mm(seen[0], parts[0], out=out)
    else:
        torch.addmm(start, seen[0], parts[0], out=out)
    for part, features in zip(parts[1:], seen[1:], strict=True):
        out.addmm_(features, part)


def _grad_weight(grad_z: Tensor, x: Tensor, layout: BlockLayout) -> Tensor:
    schedule = _schedule(layout)
    if schedule.dense:
        return (grad_z.t() @ x).view(-1).index_select(0, layout.weight_index(x.device))
    x = _ordered(x, layout, "col_order")
    grad_z = _ordered(grad_z, layout, "row_order")
    grad = x.new_empty(layout.num_weights)
    rows = zip(
        schedule.rows,
        grad.split_with_sizes(schedule.weight_sizes),
        grad_z.split_with_sizes(schedule.row_sizes, 1),
        strict=True,
    )
    for row, packed, given in rows:
        if not row.runs:
            continue
        full = packed.view(-1, row.units)
        parts = [full] if len(row.runs) == 1 else full.split_with_sizes(row.run_sizes)
        for (first, last), part in zip(row.runs, parts, strict=True):
            torch.mm(x[:, first:last].t(), given, out=part)
    return grad


def _ordered(value: Tensor, layout: BlockLayout, which: str) -> Tensor:
    """``value`` with its last dimension in block order."""
    order = getattr(layout, which)
    if order is None:
        return value if value.stride(-1) == 1 else value.contiguous()
    return value.index_select(value.dim() - 1, layout.table(which, value.device, lambda: order))


def _dense_product(x: Tensor, weight: Tensor, bias: Tensor | None, layout: BlockLayout) -> Tensor:
    """One dense product that no unseen value enters, NaN and Inf included."""
    w = layout.unpack(weight)
    bad = ~x.isfinite()
    # Where a unit sees it, its sign is what matters; where not, it meets a zero.
    finite = x.nan_to_num(0.0, 1.0, -1.0)
    y = finite @ w.t() if bias is None else torch.addmm(bias, finite, w.t())
    y += 0.0  # -1 * 0 is -0: the sign of a zero must not tell of an unseen value either
    if x.device.type == "cpu" and not bad.any():
        return y  # elsewhere the question itself would wait for the device
    mask = layout.table("mask", x.device, layout.mask)
    # What a non-finite value makes of a unit that does see it, by counting in exact integers.
    cast = torch.float32
    up, down, lost = (b.to(cast) for b in (x == torch.inf, x == -torch.inf, x.isnan()))
    plus, minus = (w > 0).to(cast).t(), (w < 0).to(cast).t()
    spoilt = (mask & ((w == 0) | w.isnan())).to(cast).t()
    nan = lost @ mask.to(cast).t() + (up + down) @ spoilt > 0
    high = up @ plus + down @ minus > 0
    low = up @ minus + down @ plus > 0
    # Added, not put in its place: a NaN or an opposite infinity in a weight or bias stays NaN.
    y = torch.where(high, y + torch.inf, y)
    y = torch.where(low, y - torch.inf, y)
    return y.masked_fill(nan, torch.nan)
