"""Is a device usable, at the start and after a kernel has failed? And CUDA graphs of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from maskmoe_kernels.errors import BackendError

#: The exit status of a process that lost the GPU. A fresh process can continue.
LOST = 3
#: Calls before a capture.
WARM_UP = 3


def check_device(device: str) -> None:
    """Raise BackendError unless torch can use ``device`` here."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BackendError(f"--device {device} cannot be used here: {reason}") from error


def is_lost(device: str) -> bool:
    """Does the GPU refuse further work of this process, as it does after an illegal access?"""
    if torch.device(device).type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def capture(call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], Any], Any]:
    """A function that replays ``call``, and the results that a replay overwrites."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # allocations, handles and tuning must not be captured
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = call()
    return graph.replay, captured
