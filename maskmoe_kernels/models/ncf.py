"""Neural collaborative filtering: the interpretable model, the black box, and content alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.subsets import SubsetFamily, Width
from maskmoe_kernels.models.mlp import InterpretableMLP
from maskmoe_kernels.nn.embedding import ContentEncoder, table_unsupported_reason
from maskmoe_kernels.nn.interception import interceptor
from maskmoe_kernels.nn.routed import Routed
from maskmoe_kernels.ops.masked_mlp.call import Inputs
from maskmoe_kernels.ops.selection.api import gem_loss
from maskmoe_kernels.ops.selection.samples import check_samples


@dataclass(frozen=True)
class NCFSizes:
    """Sizes of the three MovieLens models (section 4.2.2).

    Attributes:
        num_users: Rows of the user embedding.
        num_items: Rows of the item embedding.
        categories: Content feature to (number of values, embedding width).
        num_numeric: Numeric content features.
        numeric_width: Width of their projection.
        embedding: Width of the user and the item embedding.
    """

    num_users: int
    num_items: int
    categories: Mapping[str, tuple[int, int]] = field(
        default_factory=lambda: {"sex": (2, 2), "age": (7, 6), "occupation": (21, 8)}
    )
    num_numeric: int = 19
    numeric_width: int = 16
    embedding: int = 64


class _Inputs(nn.Module):
    """Content, user and item vectors side by side, gathered from ids."""

    def __init__(self, sizes: NCFSizes, personal: bool) -> None:
        super().__init__()
        self.content = ContentEncoder(sizes.categories, sizes.num_numeric, sizes.numeric_width)
        self.user: nn.Embedding | None = None
        self.item: nn.Embedding | None = None
        if personal:
            self.user = nn.Embedding(sizes.num_users, sizes.embedding)
            self.item = nn.Embedding(sizes.num_items, sizes.embedding)
            for table in (self.user, self.item):
                nn.init.normal_(table.weight, std=0.05)
        self.groups = {"content": self.content.out_features}
        if personal:
            self.groups |= {"user": sizes.embedding, "item": sizes.embedding}

    def forward(self, user: Tensor, item: Tensor, codes: Tensor, numeric: Tensor) -> Tensor:
        parts = [self.content(codes, numeric)]
        if self.user is not None and self.item is not None:
            parts += [self.user(user), self.item(item)]
        return torch.cat(parts, dim=-1)

    def parts(self, user: Tensor, item: Tensor, codes: Tensor, numeric: Tensor) -> Tensor | Inputs:
        """The parts of what ``forward`` returns; or that itself, if a hook, say, sees a look-up."""
        embeddings = [*self.content.embeddings.values(), self.user, self.item]
        if any(_watched(module) for module in (self, self.content, *embeddings)):
            gathered: Tensor = self(user, item, codes, numeric)
            return gathered
        numbers = self.content.project(numeric)
        count = len(embeddings) - 2
        return Inputs(
            numbers,
            [table.weight for table in embeddings if isinstance(table, nn.Embedding)],
            [*codes.unbind(-1), user, item],
            [*range(count), -self.content.numeric.out_features, count, count + 1],
        )


_FORWARDS = {cls: cls.forward for cls in (_Inputs, ContentEncoder)}


def _watched(module: nn.Module | None) -> bool:
    """Does its call do more than can be read from its weights, or does anything see it?"""
    if module is None:
        return True
    forward = _FORWARDS.get(type(module))  # type: ignore[arg-type]
    reason = table_unsupported_reason(module) if forward is None else interceptor(module, forward)
    return reason is not None


class InterpretableNCF(Routed):
    """Four experts: content, content + user, content + item, all (section 4.2.2).

    Args:
        sizes: Of the embeddings; see :class:`NCFSizes`.
        hidden: Units per expert of each hidden layer; each entry an int, or one per expert.
        embeddings: ``"shared"``: every expert that sees an embedding trains it, as in the
            authors' code; an embedding that a small expert reads then depends, through
            training, on features outside its subset. ``"strict"``: only the smallest subsets
            that contain a group train its embedding.
        backend: See :func:`masked_linear`.

    Raises:
        LayoutError: Unknown ``embeddings``.
    """

    def __init__(
        self,
        sizes: NCFSizes,
        hidden: Sequence[Width] = (128, 64, 32, 16),
        embeddings: str = "shared",
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if embeddings not in ("shared", "strict"):
            raise LayoutError(f"embeddings must be 'shared' or 'strict', got {embeddings!r}")
        self.inputs = _Inputs(sizes, personal=True)
        self.family = SubsetFamily(
            self.inputs.groups,
            {
                "content": ["content"],
                "user": ["content", "user"],
                "item": ["content", "item"],
                "all": ["content", "user", "item"],
            },
        )
        first = self.family.input_layout(hidden[0], strict=embeddings == "strict")
        self.experts = InterpretableMLP(self.family, hidden, input_layout=first, backend=backend)

    def forward(self, user: Tensor, item: Tensor, codes: Tensor, numeric: Tensor) -> Tensor:
        """Logits ``(*, 4)`` of a user and an item.

        Args:
            user: User rows, ``(*,)`` int64.
            item: Item rows, ``(*,)`` int64.
            codes: Categories of the content, ``(*, number of categories)`` int64.
            numeric: Numeric content, ``(*, num_numeric)``.
        """
        logits: Tensor = self.experts(self.inputs.parts(user, item, codes, numeric))
        return logits

    def gem_loss(
        self,
        user: Tensor,
        item: Tensor,
        codes: Tensor,
        numeric: Tensor,
        target: Tensor,
        **options: Any,
    ) -> Tensor:
        """The loss of these samples in one pass; see :meth:`InterpretableMLP.gem_loss`."""
        # The projection reads the numbers before the loss knows which samples count.
        mask, weight = options.get("mask"), options.get("sample_weight")
        check_samples(numeric.shape[:-1], numeric.device, mask, weight)
        for counts in (mask, None if weight is None else weight != 0):
            if counts is not None:
                numeric = numeric.masked_fill(~counts.unsqueeze(-1), 0)
        if interceptor(self, _FORWARD) is not None:
            logits = self(user, item, codes, numeric)
            return gem_loss(logits, target, self.family, **options)
        inputs = self.inputs.parts(user, item, codes, numeric)
        return self.experts.gem_loss(inputs, target, **options)


_FORWARD = InterpretableNCF.forward


class NCF(nn.Module):
    """The black box: the same inputs, ordinary dense layers, one logit (He et al. 2017, MLP).

    Args:
        sizes: Of the embeddings; see :class:`NCFSizes`.
        hidden: Units of each hidden layer.
        personal: Whether it sees the user and item embeddings; without, it is the
            content-based model.
    """

    def __init__(
        self,
        sizes: NCFSizes,
        hidden: Sequence[int] = (512, 256, 128, 64),
        personal: bool = True,
    ) -> None:
        super().__init__()
        self.inputs = _Inputs(sizes, personal)
        widths = [sum(self.inputs.groups.values()), *hidden]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def forward(self, user: Tensor, item: Tensor, codes: Tensor, numeric: Tensor) -> Tensor:
        """Logits z ``(*, 1)``, probability sigmoid(z); arguments as :class:`InterpretableNCF`."""
        logits: Tensor = self.layers(self.inputs(user, item, codes, numeric))
        return logits
