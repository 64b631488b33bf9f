"""Predictions without a model, to check an evaluation against known numbers."""

from __future__ import annotations

from torch import Tensor


def last_skip(skips: Tensor, padding: Tensor) -> Tensor:
    """The last skip of half A, for every track of B the same, ``(B, 1)``.

    Without a track in A it is 0.5: nothing is known.

    Args:
        skips: Of A, 0 or 1, ``(B, T)``.
        padding: Where A has no track, ``(B, T)`` bool.
    """
    real = ~padding
    last = skips.gather(1, real.cumsum(1).argmax(1, keepdim=True))
    return last.where(real.any(1, keepdim=True), 0.5)


def mean_skip(skips: Tensor, padding: Tensor) -> Tensor:
    """The mean skip of half A, for every track of B the same, ``(B, 1)``.

    Without a track in A it is 0.5: nothing is known. Arguments as for :func:`last_skip`.
    """
    real = ~padding
    count = real.sum(1, keepdim=True)
    return (skips.masked_fill(padding, 0).sum(1, keepdim=True) / count).where(count > 0, 0.5)
