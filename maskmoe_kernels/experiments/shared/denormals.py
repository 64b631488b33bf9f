"""Numbers too small to be normal, which slow a processor down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Numbers below 1e-38 count as zero, in this thread and in those that it starts.

    Adam's averages of weights that have no gradient for long shrink to such numbers and stay there;
    each costs a hundred cycles a step.
    """
    before = int(torch.tensor(1e-40).view(torch.int32)) == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
