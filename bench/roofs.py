"""What this machine can do at best: its GEMM rate and its copy bandwidth, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Roofs:
    """Limits of a machine in one dtype.

    Attributes:
        gflops: Rate of a large square product, GFLOP/s.
        gbs: Bytes read and written a second by a large copy, GB/s.
    """

    gflops: float
    gbs: float


def measure_roofs(dtype: torch.dtype, device: str, small: bool = False) -> Roofs:
    """The best of several runs: a roof is what can be reached, not what is usual.

    Args:
        dtype: Of the product.
        device: Where.
        small: Sizes that show only that it runs.
    """
    on_gpu = torch.device(device).type == "cuda"
    side = 256 if small else 8192 if on_gpu else 2048
    size = 2**22 if small else 2**30 if on_gpu else 2**27
    a, b = (torch.randn(side, side).to(device, dtype) for _ in range(2))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = _best(lambda: torch.mm(a, b), on_gpu)
    copy = _best(lambda: target.copy_(source), on_gpu)
    return Roofs(2 * side**3 / product / 1e9, 2 * size / copy / 1e9)


def _best(call: Callable[[], Any], on_gpu: bool, runs: int = 7) -> float:
    def seconds() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds()
    return min(seconds() for _ in range(runs))
