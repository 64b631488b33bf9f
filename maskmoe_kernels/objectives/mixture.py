"""The prediction and the attribution that comes with it (eq. 1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from maskmoe_kernels.layout.subsets import SubsetFamily
from maskmoe_kernels.objectives.selection import Confidence, selection, takes_kernels
from maskmoe_kernels.ops import objectives as fused


class Mixture(NamedTuple):
    """Prediction of a mixture of restricted experts.

    Attributes:
        probability: f(x), ``(*,)``.
        selection: alpha, ``(*, H)``.
        attribution: alpha_i / sum of alpha, ``(*, H)``; each row sums to 1.
    """

    probability: Tensor
    selection: Tensor
    attribution: Tensor


def mixture(
    logits: Tensor,
    family: SubsetFamily,
    confidence: Confidence = "abs",
    sharpness: float = 1.0,
) -> Mixture:
    """f(x) = sum_i alpha_i f^i / sum_i alpha_i with f^i = sigmoid(2 z_i) (eq. 1, eq. 5).

    Where no expert has any confidence (all z are 0), the experts count alike.

    Args:
        logits: z, ``(*, H)``.
        family: The subsets of the H experts.
        confidence: See :func:`selection`.
        sharpness: See :func:`selection`.

    Raises:
        LayoutError: As :func:`selection`.
    """
    differentiable = torch.is_grad_enabled() and logits.requires_grad
    if not differentiable and takes_kernels(logits, family, confidence, sharpness):
        return Mixture(*fused.mixture(logits, family, str(confidence), sharpness))
    alpha = selection(logits, family, confidence, sharpness)
    total = alpha.sum(-1, keepdim=True)
    nobody = total == 0
    share = torch.where(nobody, 1 / family.num_experts, alpha / total.masked_fill(nobody, 1))
    expert = torch.sigmoid(2 * logits.to(alpha.dtype))
    probability = (share * expert).sum(-1).clamp(max=1)  # shares may sum to 1 and a rounding
    return Mixture(probability, alpha, share)
