"""The logits of a family as values of its experts: their axis, type and company."""

from __future__ import annotations

import torch
from torch import Tensor

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.arguments import check_kind
from maskmoe_kernels.layout.subsets import SubsetFamily


def experts_last(logits: Tensor, family: SubsetFamily, dim: int | None) -> tuple[Tensor, bool]:
    """``logits`` with the experts on the last axis, in float32 (float64 stays), and whether moved.

    Args:
        logits: ``(*, H)``, or ``(*, H, K)`` of K outputs an expert.
        family: Its experts.
        dim: Axis of the experts, -1 or -2; ``None`` finds it by its size H. Two axes of that size
            are a batch of H rows if there are no others.

    Raises:
        LayoutError: No axis of size H, or two that cannot be told apart.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        shown = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise LayoutError(f"logits must be a floating-point tensor, got {shown}")
    check_kind(SubsetFamily, family=family)
    if isinstance(dim, Tensor):
        raise LayoutError(f"dim must be -1, -2 or None, got {dim!r}")
    experts, shape = family.num_experts, tuple(logits.shape)
    if dim is None:
        fits = [axis for axis in (-1, -2) if len(shape) >= -axis and shape[axis] == experts]
        if len(fits) == 2 and len(shape) > 2:
            raise LayoutError(
                f"logits {shape} have two axes of H={experts}: say which holds the experts, dim=-1 "
                "for logits (*, H) or dim=-2 for (*, H, K)"
            )
        dim = fits[0] if fits else -1
    if dim not in (-1, -2) or len(shape) < -dim or shape[dim] != experts:
        raise LayoutError(
            f"logits must be (*, H), or (*, H, K) one value per expert, H={experts}; got "
            f"{shape} and dim={dim!r}"
        )
    values = logits if logits.dtype == torch.float64 else logits.float()
    return (values, False) if dim == -1 else (values.transpose(-1, -2), True)
