"""Descriptive features of users and movies as one dense content vector."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class ContentEncoder(nn.Module):
    """Categorical embeddings beside ``tanh(Dense(numeric))`` (the paper's content group).

    Args:
        categories: Feature name to (number of values, embedding width), in order.
        num_numeric: Numeric features.
        numeric_width: Width they are projected to.
        std: Standard deviation of the initial embeddings, N(0, std).

    Attributes:
        out_features: Width of the content vector.
    """

    def __init__(
        self,
        categories: Mapping[str, tuple[int, int]],
        num_numeric: int,
        numeric_width: int,
        std: float = 0.05,
    ) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {name: nn.Embedding(count, width) for name, (count, width) in categories.items()}
        )
        for table in self.embeddings.values():
            nn.init.normal_(table.weight, std=std)  # type: ignore[arg-type]
        self.numeric = nn.Linear(num_numeric, numeric_width)
        self.out_features = sum(width for _, width in categories.values()) + numeric_width

    def forward(self, codes: Tensor, numeric: Tensor) -> Tensor:
        """Content vectors.

        Args:
            codes: Category of each feature, ``(*, number of categories)``, int64.
            numeric: ``(*, num_numeric)``.

        Returns:
            ``(*, out_features)``.
        """
        parts = [table(codes[..., k]) for k, table in enumerate(self.embeddings.values())]
        return torch.cat([*parts, self.project(numeric)], dim=-1)

    def project(self, numeric: Tensor) -> Tensor:
        """The part of the vector that comes from ``(*, num_numeric)`` numbers, its last one."""
        return torch.tanh(self.numeric(numeric))
