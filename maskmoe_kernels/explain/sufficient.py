"""The smallest expert whose answer agrees with that of the expert that sees all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from maskmoe_kernels._compat import constant_in_trace
from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.explain.values import experts_last
from maskmoe_kernels.layout.subsets import SubsetFamily


class Sufficient(NamedTuple):
    """Who suffices for each sample.

    Attributes:
        prediction: Of the expert that sees all: probability that y is 1, ``(*,)``; for K outputs,
            of each class, ``(*, K)``.
        expert: The smallest that suffices, ``(*,)`` int64.
        gap: How far its answer is from that of the expert that sees all, in log-odds, ``(*,)``.
    """

    prediction: Tensor
    expert: Tensor
    gap: Tensor


def sufficient(
    logits: Tensor, family: SubsetFamily, tolerance: float = 0.5, *, dim: int | None = None
) -> Sufficient:
    """Who suffices: the smallest expert within ``tolerance`` log-odds of the one that sees all.

    If every expert learned E[y | x_S], nothing that this one may not see would change the answer
    by more than ``tolerance``. Smallest is by number of groups, then by the gap. The gap is
    ``|2 z_i - 2 z_all|``, since ``p = sigmoid(2 z)``; for K outputs, whose probabilities are
    ``softmax(z)``, the largest difference in log-odds between any two classes.

    Args:
        logits: ``(*, H)``, or ``(*, H, K)`` of K outputs an expert. Where a group is missing, the
            logits of who sees it are NaN, and they suffice for nothing.
        family: Its experts, one of which sees all that another sees.
        tolerance: In log-odds, at least 0.
        dim: Axis of the experts in ``logits``, -1 or -2; ``None`` finds it by its size.

    Returns:
        Prediction, expert and gap. Where the expert that sees all is NaN, so are prediction and
        gap, and the expert is that one. No gradient flows through expert and gap.

    Raises:
        LayoutError: No single expert sees all, a shape that does not fit, or a bad tolerance.
    """
    values, moved = experts_last(logits, family, dim)
    if not isinstance(tolerance, (int, float)) or not tolerance >= 0:
        raise LayoutError(f"tolerance must be a number of log-odds, 0 or more, got {tolerance!r}")
    top = top_expert(family)
    answer = values[..., top]
    prediction = answer.softmax(-1) if moved else torch.sigmoid(2 * answer)
    with torch.no_grad():
        difference = values - values[..., top : top + 1]
        if moved:
            gap = difference.amax(-2) - difference.amin(-2)
        else:
            gap = 2 * difference.abs()
        size = family.caches.tables[_keep_sizes(family, values.device)]
        # By size, then by gap. The top expert suffices itself, unless it is NaN.
        fits = gap <= tolerance
        smallest = torch.where(fits, size, family.num_groups + 1).amin(-1, keepdim=True)
        candidate = fits & (size == smallest)
        expert = gap.masked_fill(~candidate, torch.inf).argmin(-1)
        expert = torch.where(fits.any(-1), expert, top)
    return Sufficient(prediction, expert, gap.gather(-1, expert[..., None])[..., 0])


@constant_in_trace
def top_expert(family: SubsetFamily) -> int:
    """The expert that sees all that another sees.

    Raises:
        LayoutError: There is none.
    """
    tops = family.inclusion.all(1).nonzero().flatten().tolist()
    if not tops:
        largest = [
            name for name, larger in zip(family.names, family.has_larger, strict=True) if not larger
        ]
        raise LayoutError(
            f"sufficiency needs an expert that sees all that the others see, but {largest[:5]} are "
            "each the largest of their kind; family.with_top() adds one"
        )
    return int(tops[0])


@constant_in_trace
def _keep_sizes(family: SubsetFamily, device: torch.device) -> tuple[str, torch.device]:
    """The number of groups of each subset, ``(H,)``, as a table: a trace could not build it."""
    family.caches.table("subset sizes", device, lambda: family.membership.sum(1))
    return "subset sizes", device
