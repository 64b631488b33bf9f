"""How float32 products are computed: exactly, or on the matrix units in tf32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def products(tf32: bool) -> Iterator[None]:
    """Set torch's ``float32_matmul_precision`` for all contenders, and restore it afterwards.

    On a GPU, "medium" is tf32 for every contender. "high" would be tf32 for cuBLAS but three
    products for more digits in our kernels, so it is not used.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
