"""Errors of a layer against the float64 definition, one row block at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.problem import Problem
from maskmoe_kernels import BlockLayout
from maskmoe_kernels.testing import dense_oracle

#: A layer with a larger relative error computes another function; it is not compared.
LIMIT = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
#: tf32 keeps ten bits of the factors of a product.
LIMIT_TF32 = 1e-2
#: Larger problems are checked on their first rows, since float64 is slow.
MOST_FLOPS = 10**10


def error_limit(problem: Problem) -> float:
    """The largest relative error that a layer may have in the problem's precision."""
    return LIMIT_TF32 if problem.tf32 else LIMIT[problem.dtype]


def rows_to_check(problem: Problem) -> int:
    """How many of the batch's first rows are computed in float64."""
    layout = problem.layout
    flops = 2 * (2 * layout.num_weights + layout.num_routed_weights)
    return min(problem.batch, max(64, MOST_FLOPS // max(flops, 1)))


def reference(problem: Problem, rows: int) -> dict[str, Tensor]:
    """Output and gradients of the first ``rows`` rows in float64; the weight's in compact form.

    The oracle computes one row block at a time, from the features it sees. Its output depends on
    nothing else, and a dense matrix of hundreds of experts would not fit into memory.
    """
    layout = problem.layout
    x, grad = problem.x.detach()[:rows].double(), problem.grad[:rows].double()
    columns = x.split(list(layout.col_sizes), 1)
    matrices = problem.row_matrices(problem.compact.detach())
    biases = problem.bias.detach().double().split(list(layout.row_sizes))
    grads = grad.split(list(layout.row_sizes), 1)
    y = []
    grad_x = [torch.zeros_like(part) for part in columns]
    grad_weight, grad_bias = [], []
    for i, sources in enumerate(problem.sources):
        if not sources:
            y.append(biases[i].expand(rows, -1))
            grad_bias.append(grads[i].sum(0))
            continue
        part = BlockLayout(
            [layout.row_sizes[i]],
            [layout.col_sizes[j] for j in sources],
            torch.ones(1, len(sources), dtype=torch.bool),
            layout.routes_grad[i : i + 1, sources],
        )
        seen = torch.cat([columns[j] for j in sources], 1).requires_grad_()
        weight = matrices[i].double().requires_grad_()
        bias = biases[i].detach().requires_grad_()
        out = dense_oracle(seen, part.pack(weight), bias, part)
        given = torch.autograd.grad(out, (seen, weight, bias), grads[i], materialize_grads=True)
        for j, piece in zip(sources, given[0].split(list(part.col_sizes), 1), strict=True):
            grad_x[j] += piece
        y.append(out.detach())
        grad_weight.append(given[1].flatten())
        grad_bias.append(given[2])
    return {
        "y": torch.cat(y, 1),
        "grad_x": torch.cat(grad_x, 1),
        "grad_weight": torch.cat(grad_weight),
        "grad_bias": torch.cat(grad_bias),
    }


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each result, relative to the largest value of the reference."""
    return {
        name: float((value.double() - expected[name]).abs().max() / expected[name].abs().max())
        for name, value in found.items()
    }
