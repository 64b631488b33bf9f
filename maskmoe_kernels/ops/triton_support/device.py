"""What a launch asks of its device; under the interpreter, that is the CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

# The interpreter runs one program at a time.
_PROCESSORS = 1


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of ``device``."""
    if device.type != "cuda":
        return _PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def has_tma(device: torch.device) -> bool:
    """Has ``device`` a tensor memory accelerator? Only then do descriptors pay."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def is_capturing() -> bool:
    """Is a CUDA graph being captured on the current stream?"""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def is_current(device: int) -> bool:
    """Do launches go to the device with this index, -1 for the CPU, as it is?"""
    return device < 0 or device == torch.cuda.current_device()


def on(device: torch.device) -> AbstractContextManager[object]:
    """Launches go to ``device`` inside this context."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
