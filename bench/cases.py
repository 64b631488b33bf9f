"""A case: one hidden layer to compute, and the dtypes it may have."""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: "tf32" is float32 whose products may round their factors to ten bits.
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Case:
    """One hidden layer: a family, d units per expert, B rows, the name of a dtype."""

    family: str
    width: int
    batch: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.family} d={self.width} B={self.batch} {self.dtype}"
