"""What a launch asks of its device; under the interpreter, that is the CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

# The interpreter runs one program at a time.
_PROCESSORS = 1
_HERE: AbstractContextManager[object] = nullcontext()


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of ``device``."""
    if device.type != "cuda":
        return _PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def is_capturing() -> bool:
    """Is a CUDA graph being captured on the current stream?"""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def on(device: torch.device) -> AbstractContextManager[object]:
    """Launches go to ``device`` inside this context."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)
