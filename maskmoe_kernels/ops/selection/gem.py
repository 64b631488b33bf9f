"""One step of generalised expectation-maximisation (section 3.3.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskmoe_kernels._compat import func_transforms
from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.subsets import SubsetFamily
from maskmoe_kernels.ops.checks import PLAIN
from maskmoe_kernels.ops.selection import schema as fused
from maskmoe_kernels.ops.selection.selection import (
    Confidence,
    check_confidence,
    check_logits,
    deselection,
    selection,
    takes_kernels,
)

_WEIGHTINGS = {"selection": selection, "deselection": deselection}
_NORMALIZE = (None, "sample", "expert", "batch")
_LABELS = "target must hold labels in [0, 1], the probability that y is 1"


def gem_loss(
    logits: Tensor,
    target: Tensor,
    family: SubsetFamily,
    confidence: Confidence = "abs",
    weighting: str = "selection",
    normalize: str | None = None,
    mask: Tensor | None = None,
    sharpness: float = 1.0,
) -> Tensor:
    """Weighted cross-entropy of every expert, weights from the old parameters (eq. 4, eq. 7).

    E-step: the weights w come from the current logits, detached. M-step: the loss is
    ``mean over samples of sum_i w_i * BCE(y, f^i)``, so expert i's gradient is its own.

    Args:
        logits: z, ``(*, H)``.
        target: y in {0, 1}, or its probability, ``(*,)``. A sample that counts and is outside
            [0, 1], or NaN, is refused: on the CPU with a LayoutError; on CUDA, and in a compiled
            graph, by an assertion (``torch._assert_async``) for which no call waits. Transforms
            of torch.func do not look.
        family: The subsets of the H experts.
        confidence: See :func:`selection`.
        weighting: ``"selection"`` (alpha, eq. 7) or ``"deselection"`` (alpha without the own
            confidence, as the authors train).
        normalize: What the weights are divided by. ``None``: nothing (eq. 7). ``"sample"``:
            their sum over the experts of the sample. ``"expert"``: their sum over the batch,
            per expert; the loss is then the sum over experts. ``"batch"``: their sum over
            everything.
        mask: ``(*,)`` bool, true where a sample counts; padding cannot reach the loss.
        sharpness: See :func:`selection`.

    Returns:
        Scalar, float32 (float64 for float64 logits). With no sample at all it is 0.

    Raises:
        LayoutError: A shape or a target that does not fit, or an unknown weighting or
            normalization.
    """
    check_logits(logits, family)
    check_loss(logits.shape[:-1], target, confidence, weighting, normalize, mask, sharpness)
    check_labels(target, mask)
    if not target.requires_grad and takes_kernels(logits, family, confidence, sharpness):
        return fused.gem_loss(
            logits, target, mask, family, str(confidence), sharpness, weighting, normalize
        )
    z = logits if logits.dtype == torch.float64 else logits.float()
    if mask is not None:
        z = z.masked_fill(~mask.unsqueeze(-1), 0)
        target = target.masked_fill(~mask, 0)
    with torch.no_grad():  # E-step: the old parameters (eq. 4)
        weight = _WEIGHTINGS[weighting](z, family, confidence, sharpness)
        weight = _normalized(weight, normalize, mask)
    # (tanh z + 1) / 2 = sigmoid(2 z): the logit form keeps its gradient at saturation.
    y = target.to(z.dtype).unsqueeze(-1).expand_as(z)
    bce = F.binary_cross_entropy_with_logits(2 * z, y, reduction="none")
    return (weight * bce).sum()


def check_loss(
    shape: torch.Size,
    target: Tensor,
    confidence: Confidence,
    weighting: str,
    normalize: str | None,
    mask: Tensor | None,
    sharpness: float,
) -> None:
    """Raise LayoutError unless the arguments of :func:`gem_loss` fit logits ``(*shape, H)``.

    The values of ``target`` are another matter: see :func:`check_labels`.
    """
    check_confidence(confidence, sharpness)
    if weighting not in _WEIGHTINGS:
        raise LayoutError(f"weighting must be one of {list(_WEIGHTINGS)}, got {weighting!r}")
    if normalize not in _NORMALIZE:
        raise LayoutError(f"normalize must be one of {list(_NORMALIZE)}, got {normalize!r}")
    for name, value in (("target", target), ("mask", mask)):
        if value is not None and value.shape != shape:
            raise LayoutError(
                f"{name} must be the logits' shape without its last dimension, {tuple(shape)}, "
                f"got {tuple(value.shape)}"
            )
    if mask is not None and mask.dtype != torch.bool:
        raise LayoutError(f"mask must be bool, got {mask.dtype}; pass mask.bool()")


def check_labels(target: Tensor, mask: Tensor | None) -> None:
    """Raise LayoutError unless the targets that count lie in [0, 1].

    Off the CPU, and in a compiled graph, this is an assertion for which nobody waits.
    """
    if torch.compiler.is_compiling():
        if not func_transforms():
            _assert_labels(target, mask)
    elif torch._C._are_functorch_transforms_active() or not target.numel():
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
        torch._assert_async((inside if mask is None else inside | ~mask).all(), _LABELS)


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


def _normalized(weight: Tensor, normalize: str | None, mask: Tensor | None) -> Tensor:
    """Weights whose sum of products with the cross-entropies is the loss."""
    if mask is not None:
        weight = weight.masked_fill(~mask.unsqueeze(-1), 0)
    if normalize == "batch":
        return _divide(weight, weight.sum())
    if normalize == "expert":
        return _divide(weight, weight.reshape(-1, weight.shape[-1]).sum(0))
    if normalize == "sample":
        weight = _divide(weight, weight.sum(-1, keepdim=True))
    if mask is None:
        return weight / max(weight[..., 0].numel(), 1)
    return weight / mask.sum().clamp(min=1)


def _divide(weight: Tensor, total: Tensor) -> Tensor:
    return weight / total.masked_fill(total == 0, 1)
