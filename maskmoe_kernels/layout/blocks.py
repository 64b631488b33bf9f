"""Which blocks of a linear map exist, which of them carry a gradient, how weights are packed."""

from __future__ import annotations

import hashlib
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from maskmoe_kernels._compat import register_constant
from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.arguments import (
    block_sizes,
    bool_matrix,
    check_kind,
    described,
    permutation,
    refuse_absent_routes,
)
from maskmoe_kernels.layout.caches import Caches
from maskmoe_kernels.layout.mask_classes import PANEL, mask_classes, panel_steps

# Counts changes of the order inside packed weights; see BlockLayout.
PACKING_VERSION = 2
# Below this many weights a block is not worth a matrix product of its own.
SMALL_BLOCK = 16
# More blocks than this, each too small for a product, are too many for a kernel's tables.
MANY_BLOCKS = 1 << 16
# Features and units a side: kernels count them in 32 bits.
MOST_FEATURES = 2**31 - 1
# Panels of units that walk more than this share of the inputs save nothing.
MOSTLY_DENSE = 0.9
# Up to this many units a side, a dense product is so cheap that nobody needs a warning.
SMALL_SIDE = 256


class NamedSubsets(Protocol):
    """What :meth:`BlockLayout.between` asks of a family: subsets of groups, both by name."""

    @property
    def groups(self) -> Mapping[str, int]: ...
    @property
    def subsets(self) -> Mapping[str, Sequence[str]]: ...


class BlockLayout:
    """Blocks of an ``(out, in)`` linear map: R row blocks (outputs) by C column blocks (inputs).

    A block is the paper's W^{ij} (eq. 14). Absent blocks are neither stored nor multiplied.
    The gradient to the input walks ``routes_grad`` blocks only; the gradient to the weights
    walks every present block.

    Packed weights are the present blocks, row block by row block; inside a row block, visible
    feature by feature in the order of the columns, the weights of its units side by side: a
    (fan-in, units) matrix that kernels read as it lies. Go through :meth:`pack` and
    :meth:`unpack`.

    Args:
        row_sizes: Units per row block, R integers of at least 1.
        col_sizes: Features per column block, C integers of at least 1.
        present: ``(R, C)`` bool.
        routes_grad: ``(R, C)`` bool, inside ``present``; ``None`` means equal to ``present``.
        row_order: Output unit at each position of the block order, ``(out,)``; ``None`` where
            blocks lie one after another (only interleaved masks need it).
        col_order: The same for input features, ``(in,)``.

    Raises:
        LayoutError: A size below 1, a shape that does not match, a routed block that is absent,
            or an order that is not a permutation.
    """

    def __init__(
        self,
        row_sizes: Sequence[int],
        col_sizes: Sequence[int],
        present: Tensor,
        routes_grad: Tensor | None = None,
        *,
        row_order: Tensor | None = None,
        col_order: Tensor | None = None,
    ) -> None:
        self.row_sizes = block_sizes("row_sizes", row_sizes)
        self.col_sizes = block_sizes("col_sizes", col_sizes)
        shape = (len(self.row_sizes), len(self.col_sizes))
        self.present = bool_matrix("present", present, shape)
        self.routes_grad = (
            self.present if routes_grad is None else bool_matrix("routes_grad", routes_grad, shape)
        )
        if not self.routes_all:
            refuse_absent_routes(self.routes_grad, self.present, "block")
        self.row_offsets: tuple[int, ...] = tuple(accumulate(self.row_sizes, initial=0))
        self.col_offsets: tuple[int, ...] = tuple(accumulate(self.col_sizes, initial=0))
        self.out_features: int = self.row_offsets[-1]
        self.in_features: int = self.col_offsets[-1]
        if max(self.out_features, self.in_features) > MOST_FEATURES:
            raise LayoutError(
                f"a layout has at most {MOST_FEATURES} units and features, got "
                f"{self.out_features} and {self.in_features}"
            )
        self.row_order = permutation("row_order", row_order, self.out_features)
        self.col_order = permutation("col_order", col_order, self.in_features)
        exact = torch.float32 if self.in_features < 2**24 else torch.float64
        fan_in = self.present.to(exact) @ torch.tensor(self.col_sizes, dtype=exact, device="cpu")
        #: Visible input features of each row block, R integers: its fan-in.
        self.row_fan_in: tuple[int, ...] = tuple(map(int, fan_in.tolist()))
        #: Where each row block starts in the packed weight, R + 1 integers.
        self.weight_offsets: tuple[int, ...] = tuple(
            accumulate(map(operator.mul, self.row_sizes, self.row_fan_in), initial=0)
        )
        self.num_weights: int = self.weight_offsets[-1]
        #: Z, the number of present blocks.
        self.num_blocks: int = int(self.present.count_nonzero())
        #: Digest of what orders the packed weights; a checkpoint records it.
        self.packing_id: int = self._packing_digest()
        #: 63-bit digest of the content; equal layouts have equal ids, on every machine.
        self.id: int = self._digest()
        #: What is computed from this layout once; it goes when the layout goes.
        self.caches = Caches()
        #: The layout that stands for all with this content, if that is another one; see
        #: ``serialized``, which sets it.
        self._registered: BlockLayout | None = None

    @classmethod
    def between(
        cls,
        rows: NamedSubsets,
        cols: NamedSubsets,
        row_width: int | Sequence[int],
        col_width: int | Sequence[int],
    ) -> BlockLayout:
        """Join two families by inclusion of their groups' names (section 4.3.4).

        Block (i, j) is present iff column subset S_j is inside row subset S_i. Its gradient is
        routed where both are the same expert: the row of the same name if that block is
        present, else the row with the same set of groups.

        Args:
            rows: Family of the output, e.g. the second half of a session.
            cols: Family of the input, e.g. the first half.
            row_width: Units per row expert; an int, or one per expert.
            col_width: Units per column expert.

        Raises:
            LayoutError: The families share no group name, or a width does not fit.
        """
        for argument, family in (("rows", rows), ("cols", cols)):
            if not hasattr(family, "groups") or not hasattr(family, "subsets"):
                raise LayoutError(f"{argument} must be a SubsetFamily, got {described(family)}")
        names = list(dict.fromkeys([*rows.groups, *cols.groups]))
        if not set(rows.groups) & set(cols.groups):
            raise LayoutError(
                f"families are joined by group name, but {list(rows.groups)} and "
                f"{list(cols.groups)} share none; name common groups alike in both"
            )
        member_r, member_c = (
            torch.tensor(
                [[name in s for name in names] for s in family.subsets.values()], device="cpu"
            )
            for family in (rows, cols)
        )
        present = ((~member_r).float() @ member_c.float().T) == 0
        equal = present & (((~member_c).float() @ member_r.float().T).T == 0)
        same_name = (
            torch.tensor([[a == b for b in cols.subsets] for a in rows.subsets], device="cpu")
            & present
        )
        routes = torch.where(same_name.any(0), same_name, equal)
        return cls(
            block_sizes("row_width", row_width, len(rows.subsets)),
            block_sizes("col_width", col_width, len(cols.subsets)),
            present,
            routes,
        )

    @classmethod
    def from_mask(cls, mask: Tensor, grad_mask: Tensor | None = None) -> BlockLayout:
        """The exact layout of any boolean mask, interleaved units and all-false rows included.

        Units whose rows (and features whose columns) are equal form a block. Where equal units
        lie apart, the layout keeps their order and blocks are gathered; so do units that see
        nested sets (MADE) in no order, if their blocks are fine. A mask without blocks worth having
        (a random one, say) is still exact; a warning says that it is no faster than a dense
        product.

        Args:
            mask: ``(out, in)``, bool or 0/1, sparse or not: may output unit o see input feature f?
            grad_mask: ``(out, in)``, inside ``mask``: does the gradient flow back? ``None``
                means wherever ``mask`` is true.

        Raises:
            LayoutError: Not a two-dimensional mask of zeros and ones with at least one row and
                column, or ``grad_mask`` true where ``mask`` is false.
        """
        found = mask_classes(mask, grad_mask)
        layout = cls(
            found.row_sizes,
            found.col_sizes,
            found.present,
            found.routes_grad,
            row_order=found.row_order,
            col_order=found.col_order,
        )
        if (
            not layout.has_blocks
            and min(layout.out_features, layout.in_features) > SMALL_SIDE
            and layout.walked_density > MOSTLY_DENSE
        ):
            warnings.warn(
                f"this {layout.out_features} x {layout.in_features} mask has "
                f"{len(found.row_sizes)} distinct rows and {len(found.col_sizes)} distinct "
                "columns, so its blocks hold "
                f"{layout.num_weights / max(layout.num_blocks, 1):.1f} weights on average: it is "
                "computed exactly, and no faster than a dense product",
                stacklevel=2,
            )
        return layout

    @property
    def density(self) -> float:
        """Share of the dense matrix that is stored, in [0, 1]."""
        return self.num_weights / (self.out_features * self.in_features)

    @cached_property
    def panel_steps(self) -> tuple[int, int]:
        """Inputs that panels of 16 neighbouring units walk, and those of them that need a mask.

        A kernel computes a panel at once: all that any of its units sees, with a mask where not
        all of them do.
        """
        return panel_steps(np.packbits(self._expand_ordered(self.present).numpy(), axis=1))

    @property
    def walked_density(self) -> float:
        """Share of the dense matrix that panels of 16 neighbouring units walk, in [0, 1].

        For blocks of at least 16 units, and for staircases, hardly more than ``density``.
        """
        return self.panel_steps[0] / (-(-self.out_features // PANEL) * self.in_features)

    @cached_property
    def num_routed_weights(self) -> int:
        """Weights in the blocks that route a gradient to the input."""
        sizes = torch.tensor(self.row_sizes, device="cpu")[:, None] * torch.tensor(
            self.col_sizes, device="cpu"
        )
        return int((sizes * self.routes_grad).sum())

    def row_blocks(self) -> list[list[int]]:
        """For each row block, the column blocks it reads, ascending."""
        columns = self.present.nonzero()[:, 1].tolist()
        ends = self.present.sum(1).cumsum(0).tolist()
        return [columns[a:b] for a, b in zip([0, *ends], ends, strict=False)]

    @property
    def has_blocks(self) -> bool:
        """Are blocks large enough, on average, to be worth a matrix product each?"""
        return self.num_weights >= SMALL_BLOCK * self.num_blocks

    @property
    def too_fine(self) -> bool:
        """Are there so many blocks of so few weights that a kernel's tables would outweigh them?

        Compiled kernels do not take such a layout; see ``ops/dispatch.py``.
        """
        return self.num_blocks > MANY_BLOCKS and not self.has_blocks

    @cached_property
    def routes_all(self) -> bool:
        """Does every present block route its gradient (an ordinary masked linear map)?"""
        return self.routes_grad is self.present or torch.equal(self.routes_grad, self.present)

    def unrouted(self) -> BlockLayout:
        """The same blocks, every one routed: the gradient to the input is then the derivative.

        Weights are packed alike, so a weight of this layout is one of that.
        """
        return self if self.routes_all else self.caches.derive("unrouted", self._routing_all)

    def _routing_all(self) -> BlockLayout:
        return BlockLayout(
            self.row_sizes,
            self.col_sizes,
            self.present,
            row_order=self.row_order,
            col_order=self.col_order,
        )

    def mask(self) -> Tensor:
        """Entry (o, f): may output unit o see input feature f? ``(out, in)``, bool."""
        return self._expand(self.present)

    def grad_mask(self) -> Tensor:
        """Entry (o, f): does unit o's gradient reach feature f? ``(out, in)``, bool."""
        return self._expand(self.routes_grad)

    def _expand(self, blocks: Tensor) -> Tensor:
        ordered = self._expand_ordered(blocks)
        if self.row_order is not None:
            ordered = ordered[self.row_order.argsort()]
        if self.col_order is not None:
            ordered = ordered[:, self.col_order.argsort()]
        return ordered

    def _expand_ordered(self, blocks: Tensor) -> Tensor:
        wide = blocks.repeat_interleave(torch.tensor(self.col_sizes, device="cpu"), dim=1)
        return wide.repeat_interleave(torch.tensor(self.row_sizes, device="cpu"), dim=0)

    @cached_property
    def _weight_index(self) -> Tensor:
        # Position in the flattened dense matrix of every packed weight.
        by_unit = self._expand_ordered(self.present).flatten().nonzero().squeeze(1)
        sizes = [b - a for a, b in pairwise(self.weight_offsets)]
        position = torch.cat(
            [
                part.view(units, -1).t().reshape(-1)
                for part, units in zip(by_unit.split(sizes), self.row_sizes, strict=True)
            ]
        )
        row = position // self.in_features
        col = position % self.in_features
        if self.row_order is not None:
            row = self.row_order[row]
        if self.col_order is not None:
            col = self.col_order[col]
        return row * self.in_features + col

    def weight_index(self, device: torch.device) -> Tensor:
        """Position in the flattened ``(out, in)`` matrix of each packed weight, int64."""
        return self.table("weight_index", device, lambda: self._weight_index)

    def table(self, name: str, device: torch.device, build: Callable[[], Tensor]) -> Tensor:
        """A table of this layout, built by ``build()`` once and kept on each ``device``."""
        return self.caches.table(name, device, build)

    def pack(self, dense: Tensor) -> Tensor:
        """Keep the present blocks of ``dense`` ``(out, in)``: ``(num_weights,)``. Differentiable.

        Raises:
            LayoutError: ``dense`` is not ``(out_features, in_features)``.
        """
        check_kind(Tensor, dense=dense)
        expected = (self.out_features, self.in_features)
        if tuple(dense.shape) != expected:
            raise LayoutError(
                f"dense must be (out_features, in_features) = {expected}, got {tuple(dense.shape)}"
            )
        return dense.reshape(-1).index_select(0, self.weight_index(dense.device))

    def unpack(self, weight: Tensor) -> Tensor:
        """Dense ``(out, in)`` matrix with zeros in absent blocks. Differentiable.

        Raises:
            LayoutError: ``weight`` is not ``(num_weights,)``.
        """
        self.check_weight(weight)
        dense = weight.new_zeros(self.out_features * self.in_features)
        dense = dense.index_copy(0, self.weight_index(weight.device), weight)
        return dense.view(self.out_features, self.in_features)

    def check_weight(self, weight: Tensor) -> None:
        """Raise LayoutError unless ``weight`` is ``(num_weights,)``."""
        check_kind(Tensor, weight=weight)
        if tuple(weight.shape) != (self.num_weights,):
            raise LayoutError(
                f"weight must hold the packed blocks, ({self.num_weights},), got "
                f"{tuple(weight.shape)}; use layout.pack(dense) for a dense matrix"
            )

    def _packing_digest(self) -> int:
        parts = [repr((PACKING_VERSION, self.row_sizes, self.col_sizes)).encode()]
        parts.append(np.packbits(self.present.numpy()).tobytes())
        for order in (self.row_order, self.col_order):
            parts.append(b"-" if order is None else order.numpy().tobytes())
        return _digest(parts)

    def _digest(self) -> int:
        routes = b"-" if self.routes_all else np.packbits(self.routes_grad.numpy()).tobytes()
        return _digest([str(self.packing_id).encode(), routes])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockLayout):
            return NotImplemented
        if self is other:
            return True
        # An id tells most layouts apart; that two have one id does not make them one.
        return self.id == other.id and self._content_equals(other)

    def _content_equals(self, other: BlockLayout) -> bool:
        return (
            self.row_sizes == other.row_sizes
            and self.col_sizes == other.col_sizes
            and torch.equal(self.present, other.present)
            and torch.equal(self.routes_grad, other.routes_grad)
            and _same_order(self.row_order, other.row_order)
            and _same_order(self.col_order, other.col_order)
        )

    def __hash__(self) -> int:
        return self.id

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockLayout:
        return self  # immutable

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (
            self.row_sizes,
            self.col_sizes,
            self.present,
            None if self.routes_all else self.routes_grad,
            self.row_order,
            self.col_order,
        )

    def __repr__(self) -> str:
        text = (
            f"BlockLayout({self.out_features} x {self.in_features}, "
            f"{len(self.row_sizes)} x {len(self.col_sizes)} blocks, {self.num_blocks} present, "
            f"density {self.density:.3f}"
        )
        if not self.routes_all:
            text += f", {int(self.routes_grad.sum())} routed"
        if self.row_order is not None or self.col_order is not None:
            text += ", interleaved"
        return text + ")"


# A trace compares it by ``==``, and may pass it to a function that it calls.
register_constant(BlockLayout)


def _same_order(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _digest(parts: Sequence[bytes]) -> int:
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(state.digest()[:8], "little") >> 1


def _rebuild(
    row_sizes: Sequence[int],
    col_sizes: Sequence[int],
    present: Tensor,
    routes_grad: Tensor | None,
    row_order: Tensor | None,
    col_order: Tensor | None,
) -> BlockLayout:
    return BlockLayout(
        row_sizes, col_sizes, present, routes_grad, row_order=row_order, col_order=col_order
    )
