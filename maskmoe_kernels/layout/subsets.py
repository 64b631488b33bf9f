"""A family of feature subsets, ordered by inclusion: one expert per subset."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from maskmoe_kernels._compat import register_constant
from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.arguments import block_sizes, check_integer, check_kind
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.caches import Caches

Width = int | Sequence[int]


class SubsetFamily:
    """Subsets S_1..S_H of disjoint feature groups X_1..X_N (section 3.2 of the paper).

    Args:
        groups: Group name to width (number of input features), in the order of the input.
        subsets: Expert name to the names of the groups it sees, in the order of the experts.
            An empty subset is allowed: such an expert is a learned prior.

    Raises:
        LayoutError: No group or subset, a width below 1, an unknown group, a group named twice
            in a subset, or two subsets that are equal (inclusion must be an order).

    Example:
        >>> family = SubsetFamily({"a": 2, "b": 1}, {"only a": ["a"], "both": ["a", "b"]})
        >>> family.strict.tolist()
        [[False, False], [True, False]]
    """

    def __init__(self, groups: Mapping[str, int], subsets: Mapping[str, Iterable[str]]) -> None:
        if not isinstance(groups, Mapping) or not isinstance(subsets, Mapping):
            raise LayoutError(
                "groups must be a mapping of name to width and subsets a mapping of name to group "
                f"names, got {type(groups).__name__} and {type(subsets).__name__}"
            )
        if not groups or not subsets:
            raise LayoutError(
                f"a family needs at least one group and one subset, got {len(groups)} groups "
                f"and {len(subsets)} subsets"
            )
        widths = block_sizes("groups", list(groups.values()), len(groups))
        self.groups: dict[str, int] = dict(zip(groups, widths, strict=True))
        self.subsets: dict[str, tuple[str, ...]] = {
            name: self._checked_subset(name, members) for name, members in subsets.items()
        }
        self._refuse_equal_subsets()
        #: What is computed from this family once; it goes when the family goes.
        self.caches = Caches()
        for name in ("strict", "has_larger"):  # torch.compile finds tables, it builds none
            self.table(name, torch.device("cpu"))

    def _checked_subset(self, name: str, members: Iterable[str]) -> tuple[str, ...]:
        if isinstance(members, str):
            raise LayoutError(
                f"subset {name!r} must be a collection of group names, got the string "
                f"{members!r}; write [{members!r}]"
            )
        seen = list(members)
        for group in seen:
            if group not in self.groups:
                raise LayoutError(
                    f"subset {name!r} names the group {group!r}, which is not among the groups "
                    f"{list(self.groups)}"
                )
        if len(set(seen)) != len(seen):
            raise LayoutError(f"subset {name!r} names a group twice: {seen}")
        return tuple(group for group in self.groups if group in set(seen))

    def _refuse_equal_subsets(self) -> None:
        first: dict[tuple[str, ...], str] = {}
        for name, members in self.subsets.items():
            if members in first:
                raise LayoutError(
                    f"subsets {first[members]!r} and {name!r} are both {list(members)}; inclusion "
                    "must be an order, so a subset may appear once. Merge the two experts or "
                    "drop one."
                )
            first[members] = name

    @classmethod
    def powerset(
        cls, groups: Mapping[str, int], min_size: int = 1, max_size: int | None = None
    ) -> SubsetFamily:
        """All subsets of ``min_size`` to ``max_size`` groups, small ones first.

        Args:
            groups: Group name to width.
            min_size: Smallest number of groups in a subset; 0 adds the empty one.
            max_size: Largest number of groups in a subset; ``None`` means all groups.

        Raises:
            LayoutError: The sizes are not ``0 <= min_size <= max_size <= len(groups)``.
        """
        check_kind(Mapping, groups=groups)
        check_integer("min_size", min_size)
        if max_size is not None:
            check_integer("max_size", max_size)
        top = len(groups) if max_size is None else max_size
        if not 0 <= min_size <= top <= len(groups):
            raise LayoutError(
                f"sizes must satisfy 0 <= min_size <= max_size <= {len(groups)} groups, got "
                f"min_size={min_size}, max_size={max_size}"
            )
        chosen = itertools.chain.from_iterable(
            itertools.combinations(groups, size) for size in range(min_size, top + 1)
        )
        return cls(groups, {"+".join(members) or "none": members for members in chosen})

    def with_top(self, name: str = "all") -> SubsetFamily:
        """This family with an expert that sees all groups, last; itself if it has one.

        Args:
            name: Of the expert that is added.

        Raises:
            LayoutError: Another expert has this name.
        """
        check_kind(str, name=name)
        everything = tuple(self.groups)
        if everything in self.subsets.values():
            return self
        if name in self.subsets:
            raise LayoutError(
                f"name {name!r} is that of the expert that sees {list(self.subsets[name])}; pass "
                "another for the one that sees all groups"
            )
        return SubsetFamily(self.groups, {**self.subsets, name: everything})

    @property
    def names(self) -> list[str]:
        """Names of the experts, in order."""
        return list(self.subsets)

    @property
    def num_groups(self) -> int:
        """N, the number of feature groups."""
        return len(self.groups)

    @property
    def num_experts(self) -> int:
        """H, the number of subsets."""
        return len(self.subsets)

    @property
    def in_features(self) -> int:
        """Width of the input: the sum of the groups' widths."""
        return sum(self.groups.values())

    @cached_property
    def membership(self) -> Tensor:
        """Entry (i, n): is group X_n in S_i? ``(H, N)``, bool."""
        position = {group: n for n, group in enumerate(self.groups)}
        member = torch.zeros(self.num_experts, self.num_groups, dtype=torch.bool, device="cpu")
        for i, members in enumerate(self.subsets.values()):
            member[i, [position[group] for group in members]] = True
        return member

    @cached_property
    def inclusion(self) -> Tensor:
        """Entry (i, j): is S_j a subset of S_i? ``(H, H)``, bool (eq. 14)."""
        return subset_of(self.membership, self.membership)

    @cached_property
    def strict(self) -> Tensor:
        """Inclusion without its diagonal: row i is omega(i). ``(H, H)``, bool."""
        return self.inclusion & ~torch.eye(self.num_experts, dtype=torch.bool, device="cpu")

    @cached_property
    def has_larger(self) -> Tensor:
        """Entry j: does some subset strictly contain S_j? ``(H,)``, bool."""
        return self.strict.any(0)

    def hasse_edges(self) -> list[tuple[str, str]]:
        """Nearest inclusions only, as ``(smaller, larger)`` names."""
        strict = self.strict.to(torch.float32)
        nearest = self.strict & ~(strict @ strict).bool()
        names = self.names
        return [(names[j], names[i]) for i, j in nearest.nonzero().tolist()]

    def rank(self) -> Tensor:
        """Length of the longest chain of proper subsets of each expert's, ``(H,)``, int64."""
        return self._rank

    @cached_property
    def _rank(self) -> Tensor:
        rank = torch.zeros(self.num_experts, dtype=torch.int64, device="cpu")
        for i in self.membership.sum(1).argsort(stable=True).tolist():
            subsets = rank[self.strict[i]]
            if subsets.numel():
                rank[i] = subsets.max() + 1
        return rank

    def visible_features(self) -> Tensor:
        """Entry (i, f): may expert i see input feature f? ``(H, in_features)``, bool."""
        widths = torch.tensor(list(self.groups.values()), device="cpu")
        return self.membership.repeat_interleave(widths, dim=1)

    def table(self, name: str, device: torch.device) -> Tensor:
        """A table of this family kept on ``device``: ``"strict"`` in float64,
        ``"is_proper_subset"``, which is the same in bool, or ``"has_larger"``.
        """
        build = {
            "strict": lambda: self.strict.double(),
            "is_proper_subset": lambda: self.strict,
            "has_larger": lambda: self.has_larger,
        }
        return self.caches.table(name, device, build[name])

    def input_layout(self, width: Width, *, strict: bool = False) -> BlockLayout:
        """Experts x groups: block (i, n) is present iff X_n is in S_i.

        Args:
            width: Units per expert; an int, or one per expert.
            strict: Route the gradient of a group to the smallest subsets that contain it only.
                By default every present block routes: raw features carry no parameters. Use it
                where the input is an embedding that must not learn from larger subsets.
        """
        member = self.membership
        routes = member
        if strict:
            # Not smallest for group n: some strict subset of S_i contains n already.
            in_subsets = self.strict.to(torch.float32) @ member.to(torch.float32)
            routes = member & ~in_subsets.bool()
        return BlockLayout(
            block_sizes("width", width, self.num_experts),
            list(self.groups.values()),
            member,
            routes,
        )

    def hidden_layout(self, in_width: Width, out_width: Width) -> BlockLayout:
        """Experts x experts: present where S_j is in S_i, gradient on the diagonal only (eq. 14).

        Args:
            in_width: Units per expert of the layer's input; an int, or one per expert.
            out_width: Units per expert of its output.
        """
        count = self.num_experts
        return BlockLayout(
            block_sizes("out_width", out_width, count),
            block_sizes("in_width", in_width, count),
            self.inclusion,
            torch.eye(count, dtype=torch.bool, device="cpu"),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SubsetFamily):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return tuple(self.groups.items()), tuple(self.subsets.items())

    def __getstate__(self) -> dict[str, Any]:
        return {"groups": self.groups, "subsets": self.subsets}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["groups"], state["subsets"])  # type: ignore[misc]

    def __repr__(self) -> str:
        if self.num_experts > 16:
            return (
                f"SubsetFamily({self.num_groups} groups, {self.num_experts} experts, "
                f"{int(self.strict.sum())} strict inclusions)"
            )
        shown = {name: list(members) for name, members in self.subsets.items()}
        return f"SubsetFamily(groups={self.groups}, subsets={shown})"


# As a layout: a trace compares it by ``==``, and may pass it to a function that it calls.
register_constant(SubsetFamily)


def subset_of(rows: Tensor, cols: Tensor) -> Tensor:
    """Entry (i, j): is the set ``cols[j]`` a subset of ``rows[i]``? Both ``(_, N)`` bool."""
    outside = (~rows).to(torch.float32) @ cols.to(torch.float32).T
    return outside == 0
