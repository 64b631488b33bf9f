"""Peak rates of this machine, measured: of a matrix product and of a copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.clock import Clock, clock_of


@dataclass(frozen=True)
class PeakRates:
    """What a machine reaches at best in one dtype.

    Attributes:
        gflops: Rate of a large square product, GFLOP/s.
        gbs: Bytes read and written a second by a large copy, GB/s.
    """

    gflops: float
    gbs: float


def measure_peak_rates(dtype: torch.dtype, device: str, small: bool = False) -> PeakRates:
    """The best of several runs, since a peak is what can be reached, not what is usual.

    Args:
        dtype: Of the product.
        device: Where to measure.
        small: Use sizes that only show that the measurement runs.
    """
    on_gpu = torch.device(device).type == "cuda"
    side = 256 if small else 8192 if on_gpu else 2048
    size = 2**22 if small else 2**30 if on_gpu else 2**27
    random = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=random, device=device).to(dtype) for _ in range(2))
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(generator=random)
    target = torch.empty_like(source)
    clock = clock_of(torch.device(device))
    product = _best(lambda: torch.mm(a, b), clock)
    copy = _best(lambda: target.copy_(source), clock)
    return PeakRates(2 * side**3 / product / 1e9, 2 * size / copy / 1e9)


def _best(call: Callable[[], Any], clock: Clock, runs: int = 7) -> float:
    clock.seconds(call)
    return min(clock.seconds(call) for _ in range(runs))
