"""Are targets what a loss takes? A cheap look at their values, where one can be had."""

from __future__ import annotations

import torch
from torch import Tensor

from maskmoe_kernels._compat import assert_async, func_transforms
from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.ops.checks import PLAIN

_LABELS = "target must hold labels in [0, 1], the probability that y is 1"
_NUMBERS = "target must hold finite numbers"


def check_labels(target: Tensor, mask: Tensor | None) -> None:
    """Raise LayoutError unless the targets that count lie in [0, 1].

    Off the CPU, and in a compiled graph, this is an assertion for which nobody waits.
    """
    _check(target, mask, 0, 1, _LABELS)


def check_classes(target: Tensor, mask: Tensor | None, classes: int) -> None:
    """Raise LayoutError unless the targets that count are integers in [0, classes); as above."""
    words = f"target must hold class indices from 0 to {classes - 1}"
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise LayoutError(f"{words}, as integers, got {target.dtype}; pass target.long()")
    _check(target, mask, 0, classes - 1, words)


def check_numbers(target: Tensor, mask: Tensor | None) -> None:
    """Raise LayoutError unless the targets that count are finite; as above."""
    if target.is_floating_point():
        largest = torch.finfo(target.dtype).max
        _check(target, mask, -largest, largest, _NUMBERS)


def _check(target: Tensor, mask: Tensor | None, low: float, high: float, words: str) -> None:
    if torch.compiler.is_compiling():
        if not func_transforms():
            _assert(target, mask, low, high, words)
    elif func_transforms() or not target.numel():
        return
    elif not target.is_cpu or type(target) not in PLAIN:
        _assert(target, mask, low, high, words)
    else:
        # One pass and two reads are the cheapest way; of NaN, both are NaN.
        least, most = torch.aminmax(target)
        if not (least.item() >= low and most.item() <= high):
            _refuse(target, mask, low, high, words)


def _assert(target: Tensor, mask: Tensor | None, low: float, high: float, words: str) -> None:
    if target.dtype != torch.bool and not target.is_meta:
        inside = (target >= low) & (target <= high)
        assert_async((inside if mask is None else inside | ~mask).all(), words)


def _refuse(target: Tensor, mask: Tensor | None, low: float, high: float, words: str) -> None:
    if mask is not None:  # what is left out may hold anything
        target = target.masked_fill(~mask, 0)
    least, most = (bound.item() for bound in torch.aminmax(target))
    if not low <= least <= most <= high:
        remedy = "leave samples without a target out with mask"
        remedy = _remedy(target, least, most) if words == _LABELS else remedy
        raise LayoutError(f"{words}, got values from {least:g} to {most:g}; {remedy}")


def _remedy(target: Tensor, low: float, high: float) -> str:
    if low != low:
        return "leave samples whose label is NaN out with mask"
    if low == -1 and high <= 1:
        return "for labels -1 and 1, pass (target + 1) / 2"
    if low >= 0 and not (target.is_floating_point() and (target != target.round()).any()):
        return "for class indices, pass target == k, with k the class to be predicted"
    return "scale them"
