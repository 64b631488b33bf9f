"""The prediction and the attribution that comes with it (eq. 1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.subsets import SubsetFamily
from maskmoe_kernels.ops.selection import schema as fused
from maskmoe_kernels.ops.selection.selection import (
    Confidence,
    selection,
    selection_of_known,
    takes_kernels,
)

_MISSING = ("propagate", "skip")


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
    missing: str = "propagate",
) -> Mixture:
    """f(x) = sum_i alpha_i f^i / sum_i alpha_i with f^i = sigmoid(2 z_i) (eq. 1, eq. 5).

    Where no expert has any confidence (all z are 0), the experts count alike.

    ``missing="skip"`` answers where groups are missing (NaN): the experts that see them have NaN
    logits and are left out, and the result is the mixture of the family of the others, sharpness
    included. The others lose nothing by that: alpha_i asks experts on subsets of S_i only, and
    these see no group that expert i does not see, so they are known wherever it is.

    Args:
        logits: z, ``(*, H)``.
        family: The subsets of the H experts.
        confidence: See :func:`selection`.
        sharpness: See :func:`selection`.
        missing: What a NaN logit does. ``"propagate"``: the mixture of its sample is NaN.
            ``"skip"``: its expert is left out, with selection and attribution 0; the mixture is
            NaN only where no expert is left.

    Raises:
        LayoutError: As :func:`selection`; an unknown ``missing``.
    """
    _check_missing(missing)
    skip = missing == "skip"
    differentiable = torch.is_grad_enabled() and logits.requires_grad
    if not skip and not differentiable and takes_kernels(logits, family, confidence, sharpness):
        return Mixture(*fused.mixture(logits, family, str(confidence), sharpness))
    if skip:
        alpha, known = selection_of_known(logits, family, confidence, sharpness)
        logits = logits.masked_fill(~known, 0)
        alike: Tensor | float = known / known.sum(-1, keepdim=True)
    else:
        alpha = selection(logits, family, confidence, sharpness)
        alike = 1 / family.num_experts
    total = alpha.sum(-1, keepdim=True)
    nobody = total == 0
    share = torch.where(nobody, alike, alpha / total.masked_fill(nobody, 1))
    expert = torch.sigmoid(2 * logits.to(alpha.dtype))
    probability = (share * expert).sum(-1).clamp(max=1)  # shares may sum to 1 and a rounding
    return Mixture(probability, alpha, share)


def _check_missing(missing: str) -> None:
    """Raise LayoutError for an unknown way with missing groups."""
    if missing not in _MISSING:
        raise LayoutError(f"missing must be one of {list(_MISSING)}, got {missing!r}")
