"""The interpretable Transformer over sessions of two halves, and the black box beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.arguments import block_sizes
from maskmoe_kernels.layout.subsets import SubsetFamily, Width
from maskmoe_kernels.models.sessions import (
    SessionBlackBox,
    SessionExperts,
    UserTable,
    check_layers,
)
from maskmoe_kernels.nn.attention import MaskedMultiheadAttention
from maskmoe_kernels.nn.linear import MaskedLinear
from maskmoe_kernels.nn.mlp import MaskedMLP
from maskmoe_kernels.nn.norm import ExpertNorm

# Units of the hidden feed-forward layer per unit of the model, as in Vaswani et al. (2017).
FEEDFORWARD_FACTOR = 4


def _feedforward(family: SubsetFamily, width: Width, inner: Width, **options: Any) -> MaskedMLP:
    layouts = [family.hidden_layout(width, inner), family.hidden_layout(inner, width)]
    return MaskedMLP(layouts, "leaky_relu", **options)


def _norm(family: SubsetFamily, width: Width, options: dict[str, Any]) -> ExpertNorm:
    created = {name: value for name, value in options.items() if name != "backend"}
    return ExpertNorm(family, width, **created)


class EncoderBlock(nn.Module):
    """Self-attention, then feed-forward; each added to its input and normalised per expert.

    ``x = norm(x + attention(x)); x = norm(x + feedforward(x))``, every map masked by inclusion.

    Args:
        family: The subsets, one expert each.
        width: Units per expert; an int, or one per expert.
        heads: Heads per expert.
        feedforward: Units per expert of the hidden feed-forward layer.
        options: ``backend``, ``device`` and ``dtype``, as for :class:`MaskedLinear`.
    """

    def __init__(
        self, family: SubsetFamily, width: Width, heads: Width, feedforward: Width, **options: Any
    ) -> None:
        super().__init__()
        self.attention = MaskedMultiheadAttention(family, width, heads, batch_first=True, **options)
        self.attention_norm = _norm(family, width, options)
        self.feedforward = _feedforward(family, width, feedforward, **options)
        self.feedforward_norm = _norm(family, width, options)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """``(B, T, units)`` to the same; ``padding`` ``(B, T)`` is true at padded steps."""
        x = self.attention_norm(x + self.attention(x, x, x, padding, need_weights=False)[0])
        y: Tensor = self.feedforward_norm(x + self.feedforward(x))
        return y


class DecoderBlock(nn.Module):
    """An encoder block with cross-attention to the first half between its two parts.

    ``x = norm(x + attention(x)); x = norm(x + cross(x, memory)); x = norm(x + feedforward(x))``.
    Expert x reads expert y's memory iff S_y is a subset of S_x.

    Args:
        family: The subsets, one expert each, of both halves.
        width: Units per expert; an int, or one per expert.
        heads: Heads per expert.
        feedforward: Units per expert of the hidden feed-forward layer.
        options: ``backend``, ``device`` and ``dtype``, as for :class:`MaskedLinear`.
    """

    def __init__(
        self, family: SubsetFamily, width: Width, heads: Width, feedforward: Width, **options: Any
    ) -> None:
        super().__init__()
        self.attention = MaskedMultiheadAttention(family, width, heads, batch_first=True, **options)
        self.attention_norm = _norm(family, width, options)
        self.cross = MaskedMultiheadAttention(
            family, width, heads, kv_family=family, batch_first=True, **options
        )
        self.cross_norm = _norm(family, width, options)
        self.feedforward = _feedforward(family, width, feedforward, **options)
        self.feedforward_norm = _norm(family, width, options)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        padding: Tensor | None = None,
        memory_padding: Tensor | None = None,
    ) -> Tensor:
        """``(B, T2, units)`` to the same, with the encoder's ``memory`` ``(B, T1, units)``."""
        x = self.attention_norm(x + self.attention(x, x, x, padding, need_weights=False)[0])
        seen = self.cross(x, memory, memory, memory_padding, need_weights=False)[0]
        x = self.cross_norm(x + seen)
        y: Tensor = self.feedforward_norm(x + self.feedforward(x))
        return y


class InterpretableTransformer(SessionExperts):
    """Encoder over A, decoder over B: expert i's logits are a function of S_i alone (4.3.4).

    Of A, expert i sees the groups in S_i at every step; of B, those that exist there. All
    layers, both halves and the attention between them follow inclusion of the whole subsets;
    see :func:`half_layout`. Attention is over all steps that are not padding. Steps carry no
    position but that in their features.

    Args:
        family: Subsets of the groups of both halves.
        second_groups: Group name to width of B, in the order of its columns, e.g.
            ``InterpretableTransformer(*skip_sessions())``.
        width: Units per expert; an int, or one per expert.
        heads: Heads per expert; an int, or one per expert.
        layers: Blocks of the encoder, and of the decoder.
        feedforward: Units per expert inside the feed-forward parts; by default four times
            ``width``.
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
        heads: Width = 1,
        layers: int = 3,
        feedforward: Width | None = None,
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
        check_layers(layers)
        if feedforward is None:
            widths = block_sizes("width", width, family.num_experts)
            feedforward = [FEEDFORWARD_FACTOR * units for units in widths]
        feedforward = block_sizes("feedforward", feedforward, family.num_experts)
        options: dict[str, Any] = {"backend": backend, "device": device, "dtype": dtype}
        self.first_input = MaskedLinear.from_layout(first, **options)
        self.second_input = MaskedLinear.from_layout(second, **options)
        self.encoder = nn.ModuleList(
            EncoderBlock(family, width, heads, feedforward, **options) for _ in range(layers)
        )
        self.decoder = nn.ModuleList(
            DecoderBlock(family, width, heads, feedforward, **options) for _ in range(layers)
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
        memory = self.first_input(first)
        for block in self.encoder:
            memory = block(memory, first_padding)
        x = self.second_input(second)
        for block in self.decoder:
            x = block(x, memory, second_padding, first_padding)
        logits: Tensor = self.head(x)
        return logits


class Transformer(SessionBlackBox):
    """The black box: the same architecture from torch's own layers, one logit a step.

    Args:
        first_features: Width of A's steps.
        second_features: Width of B's steps.
        width: Units, all heads together.
        heads: Heads.
        layers: Blocks of the encoder, and of the decoder.
        feedforward: Units inside the feed-forward parts; by default four times ``width``.
        users: Embeddings of users, in the columns of a group; ``None``: none.
        device: Where to create the parameters.
        dtype: Floating-point type of the parameters.

    Raises:
        LayoutError: Fewer than one layer, or a width that is not a multiple of ``heads``.
    """

    def __init__(
        self,
        first_features: int,
        second_features: int,
        width: int = 128,
        heads: int = 8,
        layers: int = 3,
        feedforward: int | None = None,
        *,
        users: UserTable | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(first_features, second_features, users)
        check_layers(layers)
        if heads < 1 or width % heads:
            raise LayoutError(f"width={width} must be a multiple of heads={heads}")
        created: dict[str, Any] = {"device": device, "dtype": dtype}
        options = created | {
            "dim_feedforward": FEEDFORWARD_FACTOR * width if feedforward is None else feedforward,
            "dropout": 0.0,
            "activation": F.leaky_relu,
            "batch_first": True,
        }
        self.first_input = nn.Linear(first_features, width, **created)
        self.second_input = nn.Linear(second_features, width, **created)
        self.encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, **options) for _ in range(layers)
        )
        self.decoder = nn.ModuleList(
            nn.TransformerDecoderLayer(width, heads, **options) for _ in range(layers)
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
        """Logits ``(B, T2)``; arguments as :class:`InterpretableTransformer`."""
        first, second = self.present(first, second, first_padding, second_padding, user)
        masks = _opened(first_padding), _opened(second_padding)
        memory = self.first_input(first)
        for block in self.encoder:
            memory = block(memory, src_key_padding_mask=masks[0])
        x = self.second_input(second)
        for block in self.decoder:
            x = block(x, memory, tgt_key_padding_mask=masks[1], memory_key_padding_mask=masks[0])
        logits: Tensor = self.head(x)
        return logits.squeeze(-1)


def _opened(padding: Tensor | None) -> Tensor | None:
    # torch's attention gives NaN where all steps are padding. They hold zeros and may be seen.
    return None if padding is None else padding & ~padding.all(1, keepdim=True)
