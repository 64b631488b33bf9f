"""Predictions without a model, to check an evaluation against known numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def last_skip(skips: Tensor, padding: Tensor) -> Tensor:
    """Predict for all tracks of half B the last skip of half A.

    Args:
        skips: Skips of half A, 0 or 1, ``(B, T)``.
        padding: True where half A has no track, ``(B, T)`` bool.
    Returns:
        ``(B, 1)``; 0.5 for sessions without a track in half A.
    """
    real = ~padding
    last = skips.gather(1, real.cumsum(1).argmax(1, keepdim=True))
    return last.where(real.any(1, keepdim=True), 0.5)


def mean_skip(skips: Tensor, padding: Tensor) -> Tensor:
    """Predict for all tracks of half B the mean skip of half A.

    Args:
        skips: Skips of half A, 0 or 1, ``(B, T)``.
        padding: True where half A has no track, ``(B, T)`` bool.
    Returns:
        ``(B, 1)``; 0.5 for sessions without a track in half A.
    """
    real = ~padding
    count = real.sum(1, keepdim=True)
    return (skips.masked_fill(padding, 0).sum(1, keepdim=True) / count).where(count > 0, 0.5)


def random_skip(skips: Tensor, padding: Tensor, generator: torch.Generator) -> Tensor:
    """Predict a skip of each track of half B with probability 1/2.

    Args:
        skips: Skips of half A; only its shape counts, ``(B, T)``.
        padding: Not used.
        generator: Draws the predictions, on the CPU.
    Returns:
        ``(B, T)``, from 0 to 1; a skip is predicted above 1/2.
    """
    return torch.rand(skips.shape, generator=generator).to(skips.device)
