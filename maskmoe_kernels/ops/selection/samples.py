"""Which samples count, and how much: ``sample_weight`` beside ``mask``."""

from __future__ import annotations

from types import NoneType

import torch
from torch import Tensor

from maskmoe_kernels._compat import assert_async, func_transforms
from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.ops.checks import PLAIN

_WEIGHTS = "sample_weight must hold finite numbers of at least 0, how often each sample counts"


def check_device(name: str, value: Tensor, device: torch.device) -> None:
    """Raise LayoutError unless ``value`` is on ``device``, where the input or the logits are."""
    if value.device != device:
        raise LayoutError(
            f"{name} is on {value.device}, and x, logits or predictions on {device}; move all to "
            "one device"
        )


def check_samples(
    shape: torch.Size, device: torch.device, mask: Tensor | None, sample_weight: Tensor | None
) -> None:
    """Raise LayoutError unless both have a value for each sample of a batch ``shape``.

    The values are another matter: see :func:`weighted`.
    """
    for name, value in (("mask", mask), ("sample_weight", sample_weight)):
        if not isinstance(value, (Tensor, NoneType)):
            raise LayoutError(
                f"{name} must be a tensor, got {type(value).__name__}; pass torch.as_tensor({name})"
            )
        if value is None:
            continue
        check_device(name, value, device)
        if value.shape != shape:
            raise LayoutError(
                f"{name} must be one value for each sample, {tuple(shape)}, got "
                f"{tuple(value.shape)}"
            )
    if mask is not None and mask.dtype != torch.bool:
        raise LayoutError(f"mask must be bool, got {mask.dtype}; pass mask.bool()")
    if sample_weight is not None and sample_weight.is_complex():
        raise LayoutError(f"sample_weight must be real, got {sample_weight.dtype}")


def no_gradient(target: Tensor, sample_weight: Tensor | None) -> bool:
    """Is no gradient asked for but that of predictions? Kernels have no other."""
    return not (target.requires_grad or (sample_weight is not None and sample_weight.requires_grad))


def weighted(mask: Tensor | None, sample_weight: Tensor | None) -> tuple[Tensor | None, ...]:
    """Which samples count, and how much: weights whose mean over these samples is 1.

    A sample of weight 0 does not count, whatever it holds. Weights of mean 1 leave every sum over
    a batch where it was: a loss divides by the number of samples that count, with weights or
    without.

    Args:
        mask: ``(*,)`` bool, true where a sample counts, or ``None``.
        sample_weight: ``(*,)``, at least 0 and finite where a sample counts, or ``None``: the mask
            alone then says everything.

    Returns:
        The mask ``(*,)`` bool, and the weights ``(*,)`` float64, 0 where it is false; ``None`` as
        given.

    Raises:
        LayoutError: A weight below 0, infinite or NaN; see :func:`check_labels` for where.
    """
    if sample_weight is None:
        return mask, None
    weight = sample_weight.double()
    if mask is not None:
        weight = weight.masked_fill(~mask, 0)
    _check_weights(weight)
    counts = weight > 0
    if weight.numel():  # the sum of large numbers may not be finite
        largest = weight.detach().amax()
        weight = weight / largest.masked_fill(largest == 0, 1)
    total = weight.sum()
    return counts, weight * (counts.sum() / total.masked_fill(total == 0, 1))


def _check_weights(weight: Tensor) -> None:
    if torch.compiler.is_compiling() or not weight.is_cpu or type(weight) not in PLAIN:
        if not func_transforms() and not weight.is_meta:
            assert_async(((weight >= 0) & (weight < torch.inf)).all(), _WEIGHTS)
    elif not func_transforms() and weight.numel():
        low, high = (bound.item() for bound in torch.aminmax(weight.detach()))
        if not (low >= 0 and high < torch.inf):
            raise LayoutError(
                f"{_WEIGHTS}; got values from {low:g} to {high:g}. To leave a sample out, give it "
                "the weight 0 or use mask"
            )
