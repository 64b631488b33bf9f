"""Clocks: the host's for a CPU, events on the stream for a GPU, which runs asynchronously."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch


class Clock(ABC):
    """Seconds that some calls take.

    Attributes:
        least: Seconds that a sample should last.
        asynchronous: Does the device still work when the call returns?
    """

    least: ClassVar[float]
    asynchronous: ClassVar[bool]

    @abstractmethod
    def seconds(self, run: Callable[[], Any]) -> float:
        """Seconds that ``run`` takes; earlier work has ended before it starts."""


class HostClock(Clock):
    """The host's clock, for a device whose work has ended when the call returns."""

    least = 1e-3
    asynchronous = False

    def seconds(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class EventClock(Clock):
    """Two events around the calls, on the current stream: from the first launch to the last end.

    Where the host takes longer to launch than the device to compute, this is the host's time, as a
    user sees it. An event is accurate to half a microsecond, hence the longer sample.
    """

    least = 3e-3
    asynchronous = True

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
    """Size of the cache that a cold measurement must exceed; 0: the device has no cold mode."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def own_clock() -> Callable[[], float]:
    """With one thread the process's own time, so that other processes disturb it less."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter
