"""A bad access loses the GPU for the process that made it; a fresh process can go on."""

from __future__ import annotations

import torch

#: The exit status of a process that lost the GPU.
LOST = 3


def is_lost(device: str) -> bool:
    """Does the GPU refuse further work of this process?"""
    if torch.device(device).type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
