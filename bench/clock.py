"""Clocks: the host's own for a CPU; events on the stream for a GPU, which lags behind."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch


class Clock(ABC):
    """Seconds that some calls take.

    Attributes:
        least: Seconds a sample should last.
        lags: Does the device still work when the call returns?
    """

    least: ClassVar[float]
    lags: ClassVar[bool]

    @abstractmethod
    def seconds(self, run: Callable[[], Any]) -> float:
        """Of ``run``; what was begun before has ended."""


class HostClock(Clock):
    """The processor works while its caller waits."""

    least = 1e-3
    lags = False

    def seconds(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class EventClock(Clock):
    """Two events around the calls, on the current stream: from the first launch to the last end.

    A call that takes the host longer than the device is as long as the host takes: so it is for
    whoever calls it. An event is good to half a microsecond, hence the longer sample.
    """

    least = 3e-3
    lags = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, run: Callable[[], Any]) -> float:
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> Clock:
    """The clock for work on ``device``."""
    return EventClock(device) if device.type == "cuda" else HostClock()


def cache_bytes(device: torch.device) -> int:
    """Size of the cache to be passed for a cold measurement; 0: none is made there."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)
