"""From logits to selection, mixture and loss (section 3.3): what users call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.subsets import SubsetFamily
from maskmoe_kernels.ops import dispatch
from maskmoe_kernels.ops.selection import autograd as fused
from maskmoe_kernels.ops.selection import torch_impl
from maskmoe_kernels.ops.selection.labels import check_labels
from maskmoe_kernels.ops.selection.samples import check_samples, weighted
from maskmoe_kernels.ops.selection.schema import NORMALIZATIONS, WEIGHTINGS
from maskmoe_kernels.ops.selection.torch_impl import NAMED, Confidence

_MISSING = ("propagate", "skip")
_NORMALIZE = (None, *NORMALIZATIONS[1:])


def selection(
    logits: Tensor,
    family: SubsetFamily,
    confidence: Confidence = "abs",
    sharpness: float = 1.0,
) -> Tensor:
    """alpha_i = g_i * prod over j in omega(i) of (1 - g_j) (section 3.3.2).

    Args:
        logits: z, ``(*, H)``.
        family: The subsets of the H experts.
        confidence: ``"abs"`` |F|, ``"square"`` F^2, ``"smooth"`` 2|F|^4 / (1 + |F|^3),
            ``"rare"`` (see :func:`rare_positive`), where F = tanh(z); or a function of the logits,
            its values clamped to [0, 1].
        sharpness: Power to which the confidence of every expert with a larger one above it is
            raised. Larger values leave more samples to the larger experts.

    Returns:
        ``(*, H)`` in [0, 1], float32 (float64 for float64 logits). A NaN logit reaches only
        its own expert and those whose subset contains it.

    Raises:
        LayoutError: ``logits`` do not end in H, or an unknown confidence, or sharpness not above 0.
    """
    if _is_fused(logits, family, confidence, sharpness):
        return fused.selection(logits, family, str(confidence), sharpness, own=True)
    return torch_impl.selection(logits, family, confidence, sharpness)


def deselection(
    logits: Tensor,
    family: SubsetFamily,
    confidence: Confidence = "abs",
    sharpness: float = 1.0,
) -> Tensor:
    """prod over j in omega(i) of (1 - g_j): selection without the expert's own confidence.

    Arguments, shape and errors as for :func:`selection`.
    """
    if _is_fused(logits, family, confidence, sharpness):
        return fused.selection(logits, family, str(confidence), sharpness, own=False)
    return torch_impl.deselection(logits, family, confidence, sharpness)


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
    if missing not in _MISSING:
        raise LayoutError(f"missing must be one of {list(_MISSING)}, got {missing!r}")
    is_fused = _is_fused(logits, family, confidence, sharpness)
    differentiable = torch.is_grad_enabled() and logits.requires_grad
    if missing == "skip":
        alpha = None
    elif is_fused and not differentiable:
        return Mixture(*fused.mixture(logits, family, str(confidence), sharpness))
    elif is_fused:
        alpha = fused.selection(logits, family, str(confidence), sharpness, own=True)
    else:
        alpha = torch_impl.selection(logits, family, confidence, sharpness)
    return Mixture(*torch_impl.mixture(logits, family, confidence, sharpness, alpha))


def gem_loss(
    logits: Tensor,
    target: Tensor,
    family: SubsetFamily,
    confidence: Confidence = "abs",
    weighting: str = "selection",
    normalize: str | None = None,
    mask: Tensor | None = None,
    sharpness: float = 1.0,
    sample_weight: Tensor | None = None,
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
        weighting: ``"selection"`` (alpha, eq. 7); ``"deselection"`` (alpha without the own
            confidence, as the authors train); or ``"uniform"`` (1: every expert learns from every
            sample, so that f^i becomes E[y | x_Si]; confidence and sharpness play no part).
        normalize: What the weights are divided by. ``None``: nothing (eq. 7). ``"sample"``:
            their sum over the experts of the sample. ``"expert"``: their sum over the batch,
            per expert; the loss is then the sum over experts. ``"batch"``: their sum over
            everything.
        mask: ``(*,)`` bool, true where a sample counts; padding cannot reach the loss.
        sharpness: See :func:`selection`.
        sample_weight: ``(*,)``, at least 0: a weight of 2 counts a sample twice, one of 0 leaves
            it out as ``mask`` does. Means over samples become weighted means, so a factor of all
            weights changes nothing.

    Returns:
        Scalar, float32 (float64 for float64 logits). With no sample at all it is 0.

    Raises:
        LayoutError: A shape or a target that does not fit, an unknown weighting or normalization,
            or a weight that counts and is negative, infinite or NaN (where a target outside [0, 1]
            is refused).
    """
    check_logits(logits, family)
    check_loss(
        logits.shape[:-1], target, confidence, weighting, normalize, mask, sharpness, sample_weight
    )
    constant = not (
        target.requires_grad or (sample_weight is not None and sample_weight.requires_grad)
    )
    mask, sample_weight = weighted(mask, sample_weight)
    check_labels(target, mask)
    if constant and _is_fused(logits, family, confidence, sharpness):
        weight = None if sample_weight is None else sample_weight.float()
        options = (str(confidence), sharpness, weighting, normalize, weight)
        return fused.gem_loss(logits, target, mask, family, *options)
    return torch_impl.gem_loss(
        logits, target, mask, family, confidence, sharpness, weighting, normalize, sample_weight
    )


def _is_fused(
    logits: Tensor, family: SubsetFamily, confidence: Confidence, sharpness: float
) -> bool:
    """Whether the fused ops compute this; else PyTorch does, with the same result.

    Raises:
        LayoutError: ``logits`` do not end in H, or sharpness is outside its range.
    """
    check_logits(logits, family)
    check_confidence(confidence, sharpness)
    return dispatch.choose("selection", None, family, (logits,), confidence) == "triton"


def check_loss(
    shape: torch.Size,
    target: Tensor,
    confidence: Confidence,
    weighting: str,
    normalize: str | None,
    mask: Tensor | None,
    sharpness: float,
    sample_weight: Tensor | None,
) -> None:
    """Raise LayoutError unless the arguments of :func:`gem_loss` fit logits ``(*shape, H)``.

    The values are another matter: see :func:`check_labels` and :func:`weighted`.
    """
    check_confidence(confidence, sharpness)
    if weighting not in WEIGHTINGS:
        raise LayoutError(f"weighting must be one of {list(WEIGHTINGS)}, got {weighting!r}")
    if normalize not in _NORMALIZE:
        raise LayoutError(f"normalize must be one of {list(_NORMALIZE)}, got {normalize!r}")
    if target.shape != shape:
        raise LayoutError(
            f"target must be the logits' shape without its last dimension, {tuple(shape)}, got "
            f"{tuple(target.shape)}"
        )
    check_samples(shape, mask, sample_weight)


def check_confidence(confidence: Confidence, sharpness: float) -> None:
    """Raise LayoutError for an unknown confidence, or a sharpness outside its range."""
    if not callable(confidence) and (not isinstance(confidence, str) or confidence not in NAMED):
        raise LayoutError(
            f"confidence must be one of {[*NAMED]} or a function of the logits, got {confidence!r}"
        )
    if not isinstance(sharpness, (int, float)) or not 1e-6 <= sharpness <= 1e6:
        raise LayoutError(f"sharpness must be a number from 1e-6 to 1e6, got {sharpness!r}")


def check_logits(logits: Tensor, family: SubsetFamily) -> None:
    """Raise LayoutError unless ``logits`` are floating-point ``(*, H)``."""
    if not logits.is_floating_point():
        raise LayoutError(f"logits must be floating-point, got {logits.dtype}")
    if logits.dim() == 0 or logits.shape[-1] != family.num_experts:
        raise LayoutError(
            f"logits must end in one value per expert, H={family.num_experts}, got "
            f"{tuple(logits.shape)}"
        )
