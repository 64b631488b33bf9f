"""The interpretable GRU over sessions of two halves, and the black box it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from maskmoe_kernels.layout.arguments import check_integer
from maskmoe_kernels.layout.subsets import SubsetFamily, Width
from maskmoe_kernels.models.sessions import (
    SessionBlackBox,
    SessionExperts,
    UserTable,
    check_layers,
)
from maskmoe_kernels.nn.gru import MaskedGRU
from maskmoe_kernels.nn.linear import MaskedLinear


class InterpretableGRU(SessionExperts):
    """A GRU reads A; from its last states another reads B, one logit per expert and step.

    Expert i's logits are a function of S_i alone, in both halves; see :func:`half_layout`. The
    logit of a step of B depends on that step and on earlier ones.

    Args:
        family: Subsets of the groups of both halves.
        second_groups: Group name to width of B, in the order of its columns, e.g.
            ``InterpretableGRU(*skip_sessions())``.
        width: Units per expert; an int, or one per expert.
        layers: Layers of each GRU.
        users: Embeddings of users, in the columns of a group; ``None``: none.
        strict: Whether only the smallest subsets that contain the group of the users train their
            embeddings; otherwise every expert that sees them does, and an embedding that a small
            expert reads depends, through training, on features outside its subset.
        first_groups: Group name to width of A, in the order of its columns; ``None``: all groups
            of the family. A group of one half alone is in one of the two.
        backend: See :func:`masked_linear`.
        device: Where to create the parameters.
        dtype: Floating-point type of the parameters.

    Raises:
        LayoutError: A group that the family does not know, or sizes that do not fit.
    """

    def __init__(
        self,
        family: SubsetFamily,
        second_groups: Mapping[str, int],
        width: Width = 16,
        layers: int = 1,
        *,
        users: UserTable | None = None,
        strict: bool = False,
        first_groups: Mapping[str, int] | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(family, second_groups, users, first_groups)
        first, second = self._input_layouts(width, strict)
        check_integer("layers", layers)
        options: dict[str, Any] = {"backend": backend, "device": device, "dtype": dtype}
        self.encoder = MaskedGRU(
            family, width, layers, batch_first=True, input_layout=first, **options
        )
        self.decoder = MaskedGRU(
            family, width, layers, batch_first=True, input_layout=second, **options
        )
        self.head = MaskedLinear.from_layout(family.hidden_layout(width, 1), **options)

    def forward(
        self,
        first: Tensor,
        second: Tensor,
        first_padding: Tensor | None = None,
        second_padding: Tensor | None = None,
        user: Tensor | None = None,
    ) -> Tensor:
        """Logits ``(B, T2, H)``; at padded steps they mean nothing.

        Args:
            first: Steps of A, ``(B, T1, in_A)``; without ``first_groups``, in_A is
                ``family.in_features``.
            second: Steps of B, ``(B, T2, in_B)``.
            first_padding: ``(B, T1)`` bool, true where a step is padding; whatever it holds, NaN
                and infinity included, reaches nothing.
            second_padding: ``(B, T2)`` bool.
            user: Rows of the table of users, ``(B,)`` int64, if the model has one.

        Raises:
            LayoutError: Shapes or types that do not fit.
        """
        first, second = self.present(first, second, first_padding, second_padding, user)
        _, state = self.encoder(first, padding_mask=first_padding)
        states, _ = self.decoder(second, state, padding_mask=second_padding)
        logits: Tensor = self.head(states)
        return logits


class GRU(SessionBlackBox):
    """The black box: the same architecture with ``nn.GRU``, one logit a step.

    Padding has to follow the steps: ``nn.GRU`` reads on through it, and the state is taken
    where the steps end.

    Args:
        first_features: Width of A's steps.
        second_features: Width of B's steps.
        width: Units.
        layers: Layers of each GRU.
        users: Embeddings of users, in the columns of a group; ``None``: none.
        device: Where to create the parameters.
        dtype: Floating-point type of the parameters.

    Raises:
        LayoutError: Fewer than one layer.
    """

    def __init__(
        self,
        first_features: int,
        second_features: int,
        width: int = 128,
        layers: int = 1,
        *,
        users: UserTable | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(first_features, second_features, users)
        check_layers(layers)
        created: dict[str, Any] = {"device": device, "dtype": dtype}
        # One nn.GRU per layer: the states of all layers are needed where each session ends, and a
        # deep nn.GRU returns the states of every step for its last layer only.
        self.encoder, self.decoder = (
            nn.ModuleList(
                nn.GRU(features if k == 0 else width, width, batch_first=True, **created)
                for k in range(layers)
            )
            for features in (first_features, second_features)
        )
        self.head = nn.Linear(width, 1, **created)

    def forward(
        self,
        first: Tensor,
        second: Tensor,
        first_padding: Tensor | None = None,
        second_padding: Tensor | None = None,
        user: Tensor | None = None,
    ) -> Tensor:
        """Logits ``(B, T2)``; arguments as :class:`InterpretableGRU`."""
        first, second = self.present(first, second, first_padding, second_padding, user)
        for encoder, decoder in zip(self.encoder, self.decoder, strict=True):
            first, last = encoder(first)
            if first_padding is not None:
                last = _state_at_end(first, first_padding)
            second, _ = decoder(second, last)
        logits: Tensor = self.head(second)
        return logits.squeeze(-1)


def _state_at_end(states: Tensor, padding: Tensor) -> Tensor:
    """The last state that is not padding, ``(1, B, units)``; zeros where all is padding."""
    steps = (~padding).sum(1)[:, None, None]
    last = states.gather(1, (steps - 1).clamp(min=0).expand(-1, 1, states.shape[-1]))
    return last.masked_fill(steps == 0, 0).transpose(0, 1)
