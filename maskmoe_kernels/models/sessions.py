"""Sessions of two halves, A seen in full and B to be judged, and what their models share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.arguments import block_sizes, check_integer, check_kind
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.subsets import SubsetFamily, Width
from maskmoe_kernels.nn.routed import Routed
from maskmoe_kernels.ops.checks import check_beside, check_floats
from maskmoe_kernels.ops.selection.api import Mixture, mixture
from maskmoe_kernels.ops.selection.confidence import Confidence


def second_layout(
    family: SubsetFamily, second_groups: Mapping[str, int], width: Width
) -> BlockLayout:
    """Input layout of the second half: experts x its groups, present iff the group is in S_i.

    Experts are ordered by their whole subsets, in both halves. A unit of expert y in the decoder
    also holds what S_y sees of A, so expert x may read it iff S_y is a subset of S_x. The groups of
    a subset that exist in B are not enough to decide: {position, context} and {position,
    interaction} are both {position} in B, and by that alone each would read the other's units.

    Args:
        family: Subsets of the groups of both halves.
        second_groups: Group name to width, in the order of the second half's columns. A group
            may be wider or narrower there than in the first half.
        width: Units per expert; an int, or one per expert.

    Raises:
        LayoutError: A group that is not among the family's, none at all, or a bad width.
    """
    check_kind(SubsetFamily, family=family)
    check_kind(Mapping, second_groups=second_groups)
    unknown = [name for name in second_groups if name not in family.groups]
    if unknown:
        raise LayoutError(
            f"second_groups names {unknown}, which no subset can contain; the family's groups are "
            f"{list(family.groups)}"
        )
    position = {name: n for n, name in enumerate(family.groups)}
    columns = [position[name] for name in second_groups]
    return BlockLayout(
        block_sizes("width", width, family.num_experts),
        block_sizes("second_groups", list(second_groups.values()), len(second_groups)),
        family.membership[:, columns],
    )


def check_layers(layers: int) -> None:
    """Raise LayoutError unless there is a layer."""
    check_integer("layers", layers, 1)


class SessionModel(nn.Module):
    """A model of sessions: checks both halves and sets padded steps to zero.

    Args:
        first_features: Width of A's steps.
        second_features: Width of B's steps.
    """

    def __init__(self, first_features: int, second_features: int) -> None:
        super().__init__()
        self.first_features = first_features
        self.second_features = second_features

    def present(
        self,
        first: Tensor,
        second: Tensor,
        first_padding: Tensor | None,
        second_padding: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Both halves with zeros at padded steps, whatever was there.

        Raises:
            LayoutError: Shapes or types that do not fit.
        """
        check_floats(first=first, second=second)
        check_beside(first, first_padding=first_padding, second_padding=second_padding)
        halves = (
            ("first", first, first_padding, self.first_features),
            ("second", second, second_padding, self.second_features),
        )
        for name, x, padding, features in halves:
            if x.dim() != 3 or x.shape[-1] != features or x.shape[0] != first.shape[0]:
                raise LayoutError(
                    f"{name} must be (B, T, {features}) with as many sessions as the other half, "
                    f"got first {tuple(first.shape)} and second {tuple(second.shape)}"
                )
            if padding is not None and (
                padding.dtype != torch.bool or padding.shape != x.shape[:2]
            ):
                raise LayoutError(
                    f"{name}_padding must be bool {tuple(x.shape[:2])}, got {padding.dtype} "
                    f"{tuple(padding.shape)}"
                )
        return _without(first, first_padding), _without(second, second_padding)


def _without(x: Tensor, padding: Tensor | None) -> Tensor:
    return x if padding is None else x.masked_fill(padding.unsqueeze(-1), 0)


class SessionExperts(Routed, SessionModel):
    """A session model with one logit per expert, of a family over the groups of both halves.

    Args:
        family: Subsets of the groups of A.
        second_groups: Groups of B; see :func:`second_layout`.
    """

    def __init__(self, family: SubsetFamily, second_groups: Mapping[str, int]) -> None:
        super().__init__(family.in_features, sum(second_groups.values()))
        self.family = family
        self.second_groups = dict(second_groups)

    @torch.no_grad()
    def predict(
        self,
        first: Tensor,
        second: Tensor,
        first_padding: Tensor | None = None,
        second_padding: Tensor | None = None,
        *,
        confidence: Confidence = "abs",
        sharpness: float = 1.0,
        missing: str = "propagate",
    ) -> Mixture:
        """Probability ``(B, T2)`` and attribution ``(B, T2, H)`` of each step of B (eq. 1).

        The arguments are those of ``forward`` and of :func:`mixture`. At padded steps they mean
        nothing. No gradient is recorded.
        """
        logits = self(first, second, first_padding, second_padding)
        return mixture(logits, self.family, confidence, sharpness, missing)


class SessionBlackBox(SessionModel):
    """A session model with a single logit z, ``(B, T2)``, probability sigmoid(z)."""

    @torch.no_grad()
    def predict(
        self,
        first: Tensor,
        second: Tensor,
        first_padding: Tensor | None = None,
        second_padding: Tensor | None = None,
    ) -> Tensor:
        """Probability ``(B, T2)`` of each step of B. No gradient is recorded."""
        logits: Tensor = self(first, second, first_padding, second_padding)
        return logits.sigmoid()
