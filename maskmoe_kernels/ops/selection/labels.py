"""Are labels labels? A cheap look at their values, where one can be had."""

from __future__ import annotations

import torch
from torch import Tensor

from maskmoe_kernels._compat import assert_async, func_transforms
from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.ops.checks import PLAIN

_LABELS = "target must hold labels in [0, 1], the probability that y is 1"


def check_labels(target: Tensor, mask: Tensor | None) -> None:
    """Raise LayoutError unless the targets that count lie in [0, 1].

    Off the CPU, and in a compiled graph, this is an assertion for which nobody waits.
    """
    if torch.compiler.is_compiling():
        if not func_transforms():
            _assert_labels(target, mask)
    elif func_transforms() or not target.numel():
        return
    elif not target.is_cpu or type(target) not in PLAIN:
        _assert_labels(target, mask)
    else:
        # One pass and two reads are the cheapest way; of NaN, both are NaN.
        low, high = torch.aminmax(target)
        if not (low.item() >= 0 and high.item() <= 1):
            _refuse_labels(target, mask)


def _assert_labels(target: Tensor, mask: Tensor | None) -> None:
    if target.dtype != torch.bool and not target.is_meta:
        inside = target.clamp(0, 1) == target
        assert_async((inside if mask is None else inside | ~mask).all(), _LABELS)


def _refuse_labels(target: Tensor, mask: Tensor | None) -> None:
    if mask is not None:  # what is left out may hold anything
        target = target.masked_fill(~mask, 0)
    low, high = (bound.item() for bound in torch.aminmax(target))
    if not 0 <= low <= high <= 1:
        raise LayoutError(
            f"{_LABELS}, got values from {low:g} to {high:g}; {_remedy(target, low, high)}"
        )


def _remedy(target: Tensor, low: float, high: float) -> str:
    if low != low:
        return "leave samples whose label is NaN out with mask"
    if low == -1 and high <= 1:
        return "for labels -1 and 1, pass (target + 1) / 2"
    if low >= 0 and not (target.is_floating_point() and (target != target.round()).any()):
        return "for class indices, pass target == k, with k the class to be predicted"
    return "scale them"
