"""Is a device usable: at the start, and after a kernel has failed?"""

from __future__ import annotations

import torch

from maskmoe_kernels.errors import BackendError

#: The exit status of a process that lost the GPU. A fresh process can continue.
LOST = 3


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
