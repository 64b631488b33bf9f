"""Interleaved rounds of every contender on one shape, with error against float64 beside the time.

Machines are shared and noisy: each round runs every contender once, in turn, and the report is
the median over rounds and the spread (quartiles). Ratios of medians of one process are what
counts. A step is forward, backward with a random gradient, gradients of x, weight and bias.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import rivals
from bench.shapes import FAMILIES
from maskmoe_kernels import BlockLayout
from maskmoe_kernels.testing import dense_oracle


@dataclass(frozen=True)
class Case:
    """One hidden layer: a family, d units per expert, B rows, a dtype."""

    family: str
    width: int
    batch: int
    dtype: torch.dtype = torch.float32


def measure(
    case: Case, rounds: int, contenders: Sequence[Any] = rivals.ALL, seed: int = 0
) -> dict[str, Any]:
    """Times in microseconds, relative errors and FLOPs of every contender on ``case``."""
    layout = FAMILIES[case.family]().hidden_layout(case.width, case.width)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype)

    dense = normal(layout.out_features, layout.in_features) * layout.mask()
    dense /= layout.in_features**0.5
    bias, x = normal(layout.out_features), normal(case.batch, layout.in_features)
    grad = normal(case.batch, layout.out_features)
    built = {kind.name: kind(layout, dense, bias) for kind in contenders}
    leaf = x.clone().requires_grad_()
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, contender in built.items():
        runs[name, "forward"] = lambda c=contender: _forward(c, x)
        runs[name, "step"] = lambda c=contender: _step(c, leaf, grad)
    times = _rounds(runs, rounds)
    truth = _truth(layout, dense, bias, x, grad)
    flops = 2 * case.batch * layout.num_weights
    step_flops = 2 * flops + 2 * case.batch * layout.num_routed_weights
    return {
        "family": case.family,
        "d": case.width,
        "B": case.batch,
        "dtype": str(case.dtype).removeprefix("torch."),
        "density": layout.density,
        "flops": {"forward": flops, "step": step_flops},
        "contenders": {
            kind.name: {
                "note": kind.note,
                **{what: times[kind.name, what] for what in ("forward", "step")},
                "error": _errors(built[kind.name], x, grad, truth),
            }
            for kind in contenders
        },
    }


def _forward(contender: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return contender(x)


def _step(contender: Any, x: Tensor, grad: Tensor) -> None:
    for leaf in (x, *contender.parameters):
        leaf.grad = None
    contender(x).backward(grad)


def _rounds(
    runs: dict[tuple[str, str], Callable[[], Any]], rounds: int
) -> dict[tuple[str, str], dict[str, float]]:
    for run in runs.values():
        run()  # warm up: plans, caches, threads
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            samples[key].append((time.perf_counter() - start) * 1e6)
    result = {}
    for key, values in samples.items():
        low, median, high = statistics.quantiles(values, n=4)
        result[key] = {"us": median, "q25": low, "q75": high}
    return result


def _truth(
    layout: BlockLayout, dense: Tensor, bias: Tensor, x: Tensor, grad: Tensor
) -> dict[str, Tensor]:
    weight = layout.pack(dense).double().requires_grad_()
    leaf = x.double().requires_grad_()
    y = dense_oracle(leaf, weight, bias, layout)
    grad_x, grad_w = torch.autograd.grad(y, (leaf, weight), grad.double())
    return {"y": y.detach(), "grad_x": grad_x, "grad_weight": layout.unpack(grad_w)}


def _errors(contender: Any, x: Tensor, grad: Tensor, truth: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each result relative to the largest true value."""
    leaf = x.clone().requires_grad_()
    for parameter in contender.parameters:
        parameter.grad = None
    y = contender(leaf)
    y.backward(grad)
    # Where a contender has no mask on its gradient of W, absent entries are compared too.
    found = {"y": y.detach(), "grad_x": leaf.grad, "grad_weight": contender.dense_grad()}
    return {
        name: float((found[name].double() - value).abs().max() / value.abs().max())
        for name, value in truth.items()
    }
