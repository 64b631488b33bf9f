"""Descriptive features of users and movies as one dense content vector."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.nn.interception import intercepting, interceptor

_FORWARD = nn.Embedding.forward


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
        """The last columns of the vector, ``(*, numeric_width)``; arguments as in ``forward``."""
        return torch.tanh(self.numeric(numeric))


def table_of(embedding: nn.Embedding) -> Tensor:
    """The rows of ``embedding``, ``(num_embeddings, embedding_dim)``, for :class:`Inputs`.

    All rows of a table train, also the one at ``padding_idx``. So an embedding whose call does more
    than look rows up is refused.

    Raises:
        LayoutError: The embedding has ``padding_idx``, ``max_norm``, ``scale_grad_by_freq`` or
            ``sparse``, is of another class, or its call is seen or changed by a hook, say.
    """
    reason = table_unsupported_reason(embedding)
    if reason is not None:
        raise LayoutError(
            f"embedding must only look rows up to be read without its call, but {reason}; call it, "
            "and put what it returns among the columns of x"
        )
    return embedding.weight


def table_unsupported_reason(embedding: nn.Module) -> str | None:
    """What a call of ``embedding`` does besides looking rows up, in words; None if nothing."""
    if type(embedding) is not nn.Embedding:
        return f"it is a {type(embedding).__name__}"
    if embedding.padding_idx is not None:
        return f"row padding_idx={embedding.padding_idx} has no gradient"
    if embedding.max_norm is not None:
        return f"its rows are renormalised to max_norm={embedding.max_norm}"
    if embedding.scale_grad_by_freq or embedding.sparse:
        option = "sparse" if embedding.sparse else "scale_grad_by_freq"
        return f"{option}=True makes a gradient of another kind"
    if intercepting(embedding.weight):
        return "its weight is of a class that wants to see torch's functions"
    return interceptor(embedding, _FORWARD)
