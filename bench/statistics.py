"""Quartiles of samples, and means of ratios."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, interpolated between samples.

    Of one sample, all three are that one.
    """
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, median, high


def geometric_mean(values: Iterable[float]) -> float | None:
    """The geometric mean; ``None`` of no values."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None
