"""From logits to selection, mixture and loss (section 3.3): what users call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.arguments import check_kind
from maskmoe_kernels.layout.subsets import SubsetFamily
from maskmoe_kernels.ops import dispatch
from maskmoe_kernels.ops.checks import check_name
from maskmoe_kernels.ops.selection import autograd as fused
from maskmoe_kernels.ops.selection import torch_impl
from maskmoe_kernels.ops.selection.confidence import NAMED, NAMED_OF_CLASSES, Confidence
from maskmoe_kernels.ops.selection.labels import check_classes, check_labels, check_numbers
from maskmoe_kernels.ops.selection.samples import (
    check_device,
    check_samples,
    no_gradient,
    weighted,
)
from maskmoe_kernels.ops.selection.schema import NORMALIZATIONS, WEIGHTINGS

KINDS = ("binary", "multiclass", "regression")
_MISSING = ("propagate", "skip")
_NORMALIZE = (None, *NORMALIZATIONS[1:])


def selection(
    logits: Tensor,
    family: SubsetFamily,
    confidence: Confidence = "abs",
    sharpness: float = 1.0,
    *,
    outputs: int | None = None,
) -> Tensor:
    """alpha_i = g_i * prod over j in omega(i) of (1 - g_j) (section 3.3.2).

    Args:
        logits: z, ``(*, H)``, or ``(*, H, K)``; see ``outputs``.
        family: The subsets of the H experts.
        confidence: ``"abs"``: ``|F|``; ``"square"``: ``F^2``; ``"smooth"``:
            ``2 |F|^4 / (1 + |F|^3)``; ``"rare"``: see :func:`rare_positive`; where F = tanh(z).
            Or a function of the logits, its values clamped to [0, 1].
        sharpness: Power to which the confidence of every expert with a larger one above it is
            raised. Larger values leave more samples to the larger experts.
        outputs: K classes an expert, at least 2, whose probabilities are ``softmax(z)``: ``|F|`` is
            then (K max p - 1) / (K - 1), and there is no ``"rare"``. ``None``: one logit an
            expert, ``p = sigmoid(2 z)``, the same as two classes with the logits -z and z.

    Returns:
        ``(*, H)`` in [0, 1], float32 (float64 for float64 logits). A NaN logit reaches only
        its own expert and those whose subset contains it.

    Raises:
        LayoutError: ``logits`` do not end in H, or an unknown confidence, or sharpness not above 0.
    """
    if _is_fused(logits, family, confidence, sharpness, outputs):
        return fused.selection(logits, family, str(confidence), sharpness, own=True)
    return torch_impl.selection(logits, family, confidence, sharpness, outputs)


def deselection(
    logits: Tensor,
    family: SubsetFamily,
    confidence: Confidence = "abs",
    sharpness: float = 1.0,
    *,
    outputs: int | None = None,
) -> Tensor:
    """prod over j in omega(i) of (1 - g_j): selection without the expert's own confidence.

    Arguments, shape and errors as for :func:`selection`.
    """
    if _is_fused(logits, family, confidence, sharpness, outputs):
        return fused.selection(logits, family, str(confidence), sharpness, own=False)
    return torch_impl.deselection(logits, family, confidence, sharpness, outputs)


class Mixture(NamedTuple):
    """Prediction of a mixture of restricted experts.

    Attributes:
        probability: f(x), ``(*,)``; of K classes, ``(*, K)``.
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
    *,
    outputs: int | None = None,
) -> Mixture:
    """f(x) = sum_i alpha_i f^i / sum_i alpha_i with f^i = sigmoid(2 z_i) (eq. 1, eq. 5).

    With K ``outputs``, f^i = softmax(z_i).

    Where no expert has any confidence (all z are 0), the experts count alike.

    ``missing="skip"`` answers where groups are missing (NaN): the experts that see them have NaN
    logits and are left out, and the result is the mixture of the family of the others, sharpness
    included. The others lose nothing by that: alpha_i asks experts on subsets of S_i only, and
    these see no group that expert i does not see, so they are known wherever it is.

    Args:
        logits: z, ``(*, H)``, or ``(*, H, K)``.
        family: The subsets of the H experts.
        confidence: See :func:`selection`.
        sharpness: See :func:`selection`.
        missing: What a NaN logit does. ``"propagate"``: the mixture of its sample is NaN.
            ``"skip"``: its expert is left out, with selection and attribution 0; the mixture is
            NaN only where no expert is left.
        outputs: See :func:`selection`.

    Raises:
        LayoutError: As :func:`selection`; an unknown ``missing``.
    """
    if not isinstance(missing, str) or missing not in _MISSING:
        raise LayoutError(f"missing must be one of {list(_MISSING)}, got {missing!r}")
    is_fused = _is_fused(logits, family, confidence, sharpness, outputs)
    differentiable = torch.is_grad_enabled() and logits.requires_grad
    if missing == "skip":
        alpha = None
    elif is_fused and not differentiable:
        return Mixture(*fused.mixture(logits, family, str(confidence), sharpness))
    elif is_fused:
        alpha = fused.selection(logits, family, str(confidence), sharpness, own=True)
    else:
        alpha = torch_impl.selection(logits, family, confidence, sharpness, outputs)
    return Mixture(*torch_impl.mixture(logits, family, confidence, sharpness, alpha, outputs))


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
    *,
    outputs: int | None = None,
) -> Tensor:
    """Weighted cross-entropy of every expert, weights from the old parameters (eq. 4, eq. 7).

    E-step: the weights w come from the current logits, detached. M-step: the loss is
    ``mean over samples of sum_i w_i * BCE(y, f^i)``, so expert i's gradient is its own. Of K
    ``outputs``, it is the cross-entropy of class y in ``softmax(z_i)``.

    Args:
        logits: z, ``(*, H)``, or ``(*, H, K)``.
        target: y in {0, 1}, or its probability, ``(*,)``. A sample that counts and is outside
            [0, 1], or NaN, is refused: on the CPU with a LayoutError; on CUDA, and in a compiled
            graph, by an assertion (``torch._assert_async``) for which no call waits. Transforms
            of torch.func do not look. Of K ``outputs``: class indices from 0, ``(*,)`` integers.
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
        outputs: See :func:`selection`.

    Returns:
        Scalar, float32 (float64 for float64 logits). With no sample at all it is 0.

    Raises:
        LayoutError: A shape or a target that does not fit, an unknown weighting or normalization,
            or a weight that counts and is negative, infinite or NaN (where a target outside [0, 1]
            is refused).
    """
    check_logits(logits, family, outputs)
    shape = logits.shape[: -1 if outputs is None else -2]
    options = confidence, weighting, normalize, mask, sharpness, sample_weight
    check_loss(shape, logits.device, target, *options, outputs)
    constant = no_gradient(target, sample_weight)
    mask, sample_weight = weighted(mask, sample_weight)
    check_values(target, mask, "binary" if outputs is None else "multiclass", outputs)
    arguments = family, confidence, sharpness, weighting, normalize, sample_weight
    if constant and _is_fused(logits, family, confidence, sharpness, outputs):
        return fused.gem_loss(logits, target, mask, *arguments)
    return torch_impl.gem_loss(logits, target, mask, *arguments, outputs)


def expert_loss(
    predictions: Tensor,
    target: Tensor,
    kind: str = "binary",
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    outputs: int | None = None,
) -> Tensor:
    """The loss that trains every expert on every sample: expert i then learns E[y | x_Si].

    ``mean over samples of sum_i L(y, prediction_i)``, so expert i's gradient is its own. L is

    - ``"binary"``: the cross-entropy of y and ``sigmoid(2 z_i)``, so that this is
      :func:`gem_loss` with uniform weights,
    - ``"multiclass"``: ``-log softmax(z_i)[y]``,
    - ``"regression"``: the squared error, summed over outputs.

    Args:
        predictions: ``(*, H)`` (binary, regression) or ``(*, H, K)`` (multiclass, regression).
        target: y. Binary: in {0, 1}, or its probability, ``(*,)``. Multiclass: class indices from
            0, ``(*,)`` integers. Regression: ``(*,)``, or ``(*, K)`` of K outputs; finite where a
            sample counts. Other values are refused as by :func:`gem_loss`.
        kind: What L is.
        sample_weight: ``(*,)``; see :func:`gem_loss`.
        mask: ``(*,)`` bool, true where a sample counts; padding cannot reach the loss.
        outputs: K of predictions ``(*, H, K)``; ``None`` finds it by the shapes.

    Returns:
        Scalar, float32 (float64 for float64 predictions). With no sample at all it is 0.

    Raises:
        LayoutError: Shapes or values that do not fit, shapes that fit in two ways, or an unknown
            kind.
    """
    check_kind(Tensor, predictions=predictions, target=target)
    check_name("kind", kind, KINDS)
    if not predictions.is_floating_point():
        raise LayoutError(f"predictions must be floating-point, got {predictions.dtype}")
    if outputs is None:
        outputs = _found_outputs(tuple(predictions.shape), tuple(target.shape), kind)
    elif predictions.shape[-1:] != (outputs,):
        raise LayoutError(
            f"predictions must be (*, H, K) with K=outputs={outputs!r}, got "
            f"{tuple(predictions.shape)}"
        )
    shape = predictions.shape[: -1 if outputs is None else -2]
    check_target(shape, predictions.device, target, kind, outputs)
    check_samples(shape, predictions.device, mask, sample_weight)
    mask, sample_weight = weighted(mask, sample_weight)
    check_values(target, mask, kind, outputs)
    return torch_impl.expert_loss(predictions, target, kind, outputs, mask, sample_weight)


def _found_outputs(shape: tuple[int, ...], target: tuple[int, ...], kind: str) -> int | None:
    """K if predictions of this shape are ``(*, H, K)``, ``None`` if they are ``(*, H)``."""
    if len(shape) < 2 or kind != "regression":
        return shape[-1] if kind == "multiclass" and len(shape) > 1 else None
    of_many = target == shape[:-2] + shape[-1:]
    if of_many and target == shape[:-1] and len(shape) > 2:
        raise LayoutError(
            f"predictions {shape} may be (*, H) or (*, H, K) for a target {target}: pass outputs="
            f"{shape[-1]} if they are (*, H, K), and flatten the batch if they are (*, H)"
        )
    return shape[-1] if of_many and target != shape[:-1] else None


def check_target(
    shape: Sequence[int], device: torch.device, target: Tensor, kind: str, outputs: int | None
) -> None:
    """Raise LayoutError unless ``target`` fits a batch ``(*shape,)`` of K outputs an expert.

    The predictions are on ``device``. Its values are another matter: see :func:`check_values`.
    """
    check_name("kind", kind, KINDS)
    check_kind(Tensor, target=target)
    check_device("target", target, device)
    if kind == ("multiclass" if outputs is None else "binary"):
        known = "one output" if outputs is None else f"{outputs} outputs"
        needed = "K outputs, predictions (*, H, K)" if outputs is None else "one output"
        raise LayoutError(f"{kind!r} needs experts with {needed}; these have {known}")
    of_outputs = () if outputs is None or kind != "regression" else (outputs,)
    if tuple(target.shape) != (*shape, *of_outputs):
        raise LayoutError(
            f"target must be {(*shape, *of_outputs)} for {kind!r}, got {tuple(target.shape)}"
        )


def _is_fused(
    logits: Tensor,
    family: SubsetFamily,
    confidence: Confidence,
    sharpness: float,
    outputs: int | None,
) -> bool:
    """Whether the fused ops compute this; else PyTorch does, with the same result.

    Raises:
        LayoutError: ``logits`` do not end in H, or sharpness is outside its range.
    """
    check_logits(logits, family, outputs)
    check_confidence(confidence, sharpness, outputs)
    if outputs is not None:
        return False
    return dispatch.choose("selection", None, family, (logits,), confidence) == "triton"


def check_loss(
    shape: torch.Size,
    device: torch.device,
    target: Tensor,
    confidence: Confidence,
    weighting: str,
    normalize: str | None,
    mask: Tensor | None,
    sharpness: float,
    sample_weight: Tensor | None,
    outputs: int | None = None,
) -> None:
    """Raise LayoutError unless the arguments of :func:`gem_loss` fit logits ``(*shape, H)``.

    The logits are on ``device``.
    The values are another matter: see :func:`check_labels` and :func:`weighted`.
    """
    check_confidence(confidence, sharpness, outputs)
    if not isinstance(weighting, str) or weighting not in WEIGHTINGS:
        raise LayoutError(f"weighting must be one of {list(WEIGHTINGS)}, got {weighting!r}")
    if not isinstance(normalize, (str, type(None))) or normalize not in _NORMALIZE:
        raise LayoutError(f"normalize must be one of {list(_NORMALIZE)}, got {normalize!r}")
    check_kind(Tensor, target=target)
    check_device("target", target, device)
    if target.shape != shape:
        raise LayoutError(
            f"target must be one value for each sample, {tuple(shape)}, got {tuple(target.shape)}"
        )
    check_samples(shape, device, mask, sample_weight)


def check_values(target: Tensor, mask: Tensor | None, kind: str, outputs: int | None) -> None:
    """Raise LayoutError if a target that counts is none for a loss of this kind."""
    if kind == "binary":
        check_labels(target, mask)
    elif kind == "multiclass":
        check_classes(target, mask, outputs or 1)
    else:
        check_numbers(target, mask if mask is None or outputs is None else mask.unsqueeze(-1))


def check_confidence(confidence: Confidence, sharpness: float, outputs: int | None = None) -> None:
    """Raise LayoutError for an unknown confidence, or a sharpness outside its range."""
    named = NAMED if outputs is None else NAMED_OF_CLASSES
    if not callable(confidence) and (not isinstance(confidence, str) or confidence not in named):
        raise LayoutError(
            f"confidence must be one of {[*named]} or a function of the logits, got {confidence!r}"
        )
    if not isinstance(sharpness, (int, float)) or not 1e-6 <= sharpness <= 1e6:
        raise LayoutError(f"sharpness must be a number from 1e-6 to 1e6, got {sharpness!r}")


def check_logits(logits: Tensor, family: SubsetFamily, outputs: int | None = None) -> None:
    """Raise LayoutError unless ``logits`` are floating-point ``(*, H)``, or ``(*, H, outputs)``."""
    if not isinstance(logits, Tensor) or not isinstance(family, SubsetFamily):
        check_kind(Tensor, logits=logits)
        check_kind(SubsetFamily, family=family)
    if not logits.is_floating_point():
        raise LayoutError(f"logits must be floating-point, got {logits.dtype}")
    if outputs is None:
        if logits.dim() == 0 or logits.shape[-1] != family.num_experts:
            raise LayoutError(
                f"logits must end in one value per expert, H={family.num_experts}, got "
                f"{tuple(logits.shape)}; if they end in K classes an expert, pass outputs=K"
            )
        return
    if isinstance(outputs, bool) or not isinstance(outputs, int) or outputs < 2:
        raise LayoutError(f"outputs must be None, or 2 classes at least, got {outputs!r}")
    if tuple(logits.shape[-2:]) != (family.num_experts, outputs):
        raise LayoutError(
            f"logits must end in (H, K) = {(family.num_experts, outputs)}, got "
            f"{tuple(logits.shape)}"
        )
