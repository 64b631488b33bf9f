"""How float32 products are computed: exactly, or on the matrix units in tf32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def products(tf32: bool) -> Iterator[None]:
    """torch's ``float32_matmul_precision``, for everybody alike; afterwards what it was.

    "medium" is tf32 for everybody on a GPU; "high" is that for cuBLAS, and three times the work,
    for more digits, for our kernels.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
