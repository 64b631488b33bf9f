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


def half_layout(
    family: SubsetFamily,
    groups: Mapping[str, int],
    width: Width,
    *,
    strict: bool = False,
    half: str = "groups",
) -> BlockLayout:
    """Input layout of a half: experts x its groups, present iff the group is in S_i.

    Experts are ordered by their whole subsets, in both halves. A unit of expert y in the decoder
    also holds what S_y sees of A, so expert x may read it iff S_y is a subset of S_x. The groups of
    a subset that exist in B are not enough to decide: {position, context} and {position,
    interaction} are both {position} in B, and by that alone each would read the other's units.

    Args:
        family: Subsets of the groups of both halves.
        groups: Group name to width, in the order of the half's columns. A group may be wider or
            narrower than in the family, and than in the other half.
        width: Units per expert; an int, or one per expert.
        strict: Route the gradient of a group to the smallest subsets that contain it only; see
            :meth:`SubsetFamily.input_layout`.
        half: What ``groups`` is called in an error.

    Raises:
        LayoutError: A group that is not among the family's, none at all, or a bad width.
    """
    check_kind(SubsetFamily, family=family)
    check_kind(Mapping, **{half: groups})
    unknown = [name for name in groups if name not in family.groups]
    if unknown:
        raise LayoutError(
            f"{half} names {unknown}, which no subset can contain; the family's groups are "
            f"{list(family.groups)}"
        )
    position = {name: n for n, name in enumerate(family.groups)}
    columns = [position[name] for name in groups]
    return BlockLayout(
        block_sizes("width", width, family.num_experts),
        block_sizes(half, list(groups.values()), len(groups)),
        family.membership[:, columns],
        family.input_layout(1, strict=strict).routes_grad[:, columns],
    )


def check_layers(layers: int) -> None:
    """Raise LayoutError unless there is a layer."""
    check_integer("layers", layers, 1)


class UserTable(nn.Module):
    """Embeddings of users, which stand in the columns of one group at every step.

    Args:
        count: Rows of the table.
        group: The group; its width is that of the embedding.
        first_groups: Groups of A and their widths, in the order of its columns.
        second_groups: Those of B. The group is in one of them, or in both.
        std: Standard deviation of the initial embeddings, N(0, std).
        sparse: Whether the gradient is sparse, with the rows of the batch alone. With
            :class:`maskmoe_kernels.nn.RowAdam`, a step then costs as much whatever ``count`` is,
            and gives the same to rounding.

    Raises:
        LayoutError: The group is in neither half, or of another width in B than in A.
    """

    def __init__(
        self,
        count: int,
        group: str,
        first_groups: Mapping[str, int],
        second_groups: Mapping[str, int],
        std: float = 0.05,
        *,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        check_integer("count", count, 1)
        widths = {groups[group] for groups in (first_groups, second_groups) if group in groups}
        if len(widths) != 1:
            raise LayoutError(
                f"group {group!r} must be one of A or B, or of both and as wide in both, got "
                f"{dict(first_groups)} and {dict(second_groups)}"
            )
        (width,) = widths
        self.table = nn.Embedding(count, width, sparse=sparse)
        nn.init.normal_(self.table.weight, std=std)
        self.places = tuple(_place(group, groups) for groups in (first_groups, second_groups))

    def forward(self, first: Tensor, second: Tensor, user: Tensor) -> tuple[Tensor, Tensor]:
        """Both halves with the users' embeddings in the group's columns, whatever was there.

        Args:
            first: ``(B, T1, in_A)``.
            second: ``(B, T2, in_B)``.
            user: Rows of the table, ``(B,)`` int64.

        Raises:
            LayoutError: ``user`` has another shape or type.
        """
        if user.shape != first.shape[:1] or user.dtype != torch.int64:
            raise LayoutError(
                f"user must be int64 ({len(first)},), a row of the table a session, got "
                f"{user.dtype} {tuple(user.shape)}"
            )
        embedded = self.table(user).to(first.dtype).unsqueeze(1)
        halves = []
        for x, place in zip((first, second), self.places, strict=True):
            if place is not None:
                wide = embedded.expand(-1, x.shape[1], -1)
                x = torch.cat([x[..., : place[0]], wide, x[..., place[1] :]], -1)
            halves.append(x)
        return halves[0], halves[1]


def _place(group: str, groups: Mapping[str, int]) -> tuple[int, int] | None:
    """The first column of a group, and the one after its last; ``None``: there is no such group."""
    start = 0
    for name, width in groups.items():
        if name == group:
            return start, start + width
        start += width
    return None


class SessionModel(nn.Module):
    """A model of sessions: checks both halves and sets padded steps to zero.

    Args:
        first_features: Width of A's steps.
        second_features: Width of B's steps.
        users: Embeddings of users; ``None``: the sessions have no users.
    """

    def __init__(
        self, first_features: int, second_features: int, users: UserTable | None = None
    ) -> None:
        super().__init__()
        self.users = users
        self.first_features = first_features
        self.second_features = second_features

    def present(
        self,
        first: Tensor,
        second: Tensor,
        first_padding: Tensor | None,
        second_padding: Tensor | None,
        user: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both halves with the users' embeddings, and zeros at padded steps, whatever was there.

        Raises:
            LayoutError: Shapes or types that do not fit, or users are missing.
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
        if self.users is not None:
            if user is None:
                raise LayoutError("user must be given: this model has embeddings of users")
            first, second = self.users(first, second, user)
        return _without(first, first_padding), _without(second, second_padding)


def _without(x: Tensor, padding: Tensor | None) -> Tensor:
    return x if padding is None else x.masked_fill(padding.unsqueeze(-1), 0)


class SessionExperts(Routed, SessionModel):
    """A session model with one logit per expert, of a family over the groups of both halves.

    Args:
        family: Subsets of the groups of both halves.
        second_groups: Groups of B; see :func:`half_layout`.
        users: Embeddings of users; ``None``: the sessions have no users.
        first_groups: Groups of A; ``None``: all of the family, as it has them.
    """

    def __init__(
        self,
        family: SubsetFamily,
        second_groups: Mapping[str, int],
        users: UserTable | None = None,
        first_groups: Mapping[str, int] | None = None,
    ) -> None:
        check_kind(SubsetFamily, family=family)
        first_groups = family.groups if first_groups is None else first_groups
        check_kind(Mapping, first_groups=first_groups, second_groups=second_groups)
        first = block_sizes("first_groups", list(first_groups.values()), len(first_groups))
        second = block_sizes("second_groups", list(second_groups.values()), len(second_groups))
        super().__init__(sum(first), sum(second), users)
        self.family = family
        self.first_groups, self.second_groups = dict(first_groups), dict(second_groups)

    def _input_layouts(self, width: Width, strict: bool) -> tuple[BlockLayout, BlockLayout]:
        """The input layouts of both halves; see :func:`half_layout`."""
        return (
            half_layout(self.family, self.first_groups, width, strict=strict, half="first_groups"),
            half_layout(
                self.family, self.second_groups, width, strict=strict, half="second_groups"
            ),
        )

    @torch.no_grad()
    def predict(
        self,
        first: Tensor,
        second: Tensor,
        first_padding: Tensor | None = None,
        second_padding: Tensor | None = None,
        user: Tensor | None = None,
        *,
        confidence: Confidence = "abs",
        sharpness: float = 1.0,
        missing: str = "propagate",
    ) -> Mixture:
        """Probability ``(B, T2)`` and attribution ``(B, T2, H)`` of each step of B (eq. 1).

        The arguments are those of ``forward`` and of :func:`mixture`. At padded steps they mean
        nothing. No gradient is recorded.
        """
        logits = self(first, second, first_padding, second_padding, user)
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
        user: Tensor | None = None,
    ) -> Tensor:
        """Probability ``(B, T2)`` of each step of B. No gradient is recorded."""
        logits: Tensor = self(first, second, first_padding, second_padding, user)
        return logits.sigmoid()
