"""Which blocks of a linear map exist, which of them carry a gradient, how weights are packed."""

from __future__ import annotations

import hashlib
import operator
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import register_constant

from maskmoe_kernels.errors import LayoutError

if TYPE_CHECKING:
    from maskmoe_kernels.layout.subsets import SubsetFamily

# Counts changes of the order inside packed weights; see BlockLayout.
PACKING_VERSION = 2
# Below this many weights a block is not worth a matrix product of its own.
SMALL_BLOCK = 16
# More blocks than this, each too small for a product, are too many for a kernel's tables.
MANY_BLOCKS = 1 << 16
# Features and units a side: kernels count them in 32 bits.
MOST_FEATURES = 2**31 - 1
# Up to this many units a side, a dense product is so cheap that nobody needs a warning.
SMALL_SIDE = 256


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
        self.row_sizes = block_sizes("row_sizes", row_sizes, len(list(row_sizes)))
        self.col_sizes = block_sizes("col_sizes", col_sizes, len(list(col_sizes)))
        shape = (len(self.row_sizes), len(self.col_sizes))
        self.present = _bool_matrix("present", present, shape)
        self.routes_grad = (
            self.present if routes_grad is None else _bool_matrix("routes_grad", routes_grad, shape)
        )
        if not self.routes_all:
            _refuse_absent_routes(self.routes_grad, self.present, "block")
        self.row_offsets: tuple[int, ...] = tuple(accumulate(self.row_sizes, initial=0))
        self.col_offsets: tuple[int, ...] = tuple(accumulate(self.col_sizes, initial=0))
        self.out_features: int = self.row_offsets[-1]
        self.in_features: int = self.col_offsets[-1]
        if max(self.out_features, self.in_features) > MOST_FEATURES:
            raise LayoutError(
                f"a layout has at most {MOST_FEATURES} units and features, got "
                f"{self.out_features} and {self.in_features}"
            )
        self.row_order = _order("row_order", row_order, self.out_features)
        self.col_order = _order("col_order", col_order, self.in_features)
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
        self._tables: dict[tuple[str, torch.device], Tensor] = {}
        #: (backend, dtype, device) of a call to the op and plan that serve it; see ops/.
        self.routes: dict[tuple[str | None, torch.dtype, torch.device], Any] = {}
        self._registered: BlockLayout | None = None  # see layout/plan.py

    @classmethod
    def between(
        cls,
        rows: SubsetFamily,
        cols: SubsetFamily,
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
            torch.tensor([[a == b for b in cols.names] for a in rows.names], device="cpu") & present
        )
        routes = torch.where(same_name.any(0), same_name, equal)
        return cls(
            block_sizes("row_width", row_width, rows.num_experts),
            block_sizes("col_width", col_width, cols.num_experts),
            present,
            routes,
        )

    @classmethod
    def from_mask(cls, mask: Tensor, grad_mask: Tensor | None = None) -> BlockLayout:
        """The exact layout of any boolean mask, interleaved units and all-false rows included.

        Units whose rows (and features whose columns) are equal form a block. Where equal units
        lie apart, the layout keeps their order and blocks are gathered. A mask without blocks
        worth having (a random one, say) is still exact; a warning says that it runs as a dense
        product.

        Args:
            mask: ``(out, in)``, bool or 0/1, sparse or not: may output unit o see input feature f?
            grad_mask: ``(out, in)``, inside ``mask``: does the gradient flow back? ``None``
                means wherever ``mask`` is true.

        Raises:
            LayoutError: Not a two-dimensional mask of zeros and ones with at least one row and
                column, or ``grad_mask`` true where ``mask`` is false.
        """
        seen = _mask_array("mask", mask)
        routed = seen if grad_mask is None else _mask_array("grad_mask", grad_mask)
        if routed.shape != seen.shape:
            raise LayoutError(
                f"grad_mask must have the shape of mask, {seen.shape}, got {routed.shape}"
            )
        if routed is not seen:
            _refuse_absent_routes(torch.from_numpy(routed), torch.from_numpy(seen), "entry")
        masks = [seen] if routed is seen else [seen, routed]
        row_class, row_order = _classes(
            np.concatenate([np.packbits(m, axis=1) for m in masks], axis=1), seen.sum(1)
        )
        col_class, col_order = _classes(
            np.concatenate([np.packbits(_turned(m), axis=1) for m in masks], axis=1), seen.sum(0)
        )
        rows = [int(members[0]) for members in row_class]
        cols = [int(members[0]) for members in col_class]
        layout = cls(
            [len(members) for members in row_class],
            [len(members) for members in col_class],
            torch.from_numpy(_pick(seen, rows, cols)),
            None if routed is seen else torch.from_numpy(_pick(routed, rows, cols)),
            row_order=row_order,
            col_order=col_order,
        )
        if not layout.has_blocks and min(seen.shape) > SMALL_SIDE:
            warnings.warn(
                f"this {seen.shape[0]} x {seen.shape[1]} mask has {len(rows)} distinct rows and "
                f"{len(cols)} distinct columns, so its blocks hold "
                f"{layout.num_weights / max(layout.num_blocks, 1):.1f} weights on average: it is "
                "computed exactly, by a dense product, and no faster than one",
                stacklevel=2,
            )
        return layout

    @property
    def density(self) -> float:
        """Share of the dense matrix that is stored, in [0, 1]."""
        return self.num_weights / (self.out_features * self.in_features)

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

        Compiled kernels do not take such a layout; who chooses what runs asks here.
        """
        return self.num_blocks > MANY_BLOCKS and not self.has_blocks

    @cached_property
    def routes_all(self) -> bool:
        """Does every present block route its gradient (an ordinary masked linear map)?"""
        return self.routes_grad is self.present or torch.equal(self.routes_grad, self.present)

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
        return keep_table(self._tables, (name, device), build)

    def pack(self, dense: Tensor) -> Tensor:
        """Keep the present blocks of ``dense`` ``(out, in)``: ``(num_weights,)``. Differentiable.

        Raises:
            LayoutError: ``dense`` is not ``(out_features, in_features)``.
        """
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


def keep_table(
    tables: dict[tuple[str, torch.device], Tensor],
    key: tuple[str, torch.device],
    build: Callable[[], Tensor],
) -> Tensor:
    """``build()`` on the key's device, from ``tables`` if it is there already."""
    if key not in tables:
        if torch.compiler.is_dynamo_compiling():  # a trace holds it in its graph
            return build().to(key[1])
        # A table outlives the call that needs it first: no fake tensor of a trace, and no
        # inference tensor, which a later backward could not save.
        with (
            _disable_current_modes(),
            torch._C.DisableTorchFunction(),
            torch.inference_mode(False),
        ):
            tables[key] = build().to(key[1], copy=True)
    return tables[key]


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


def block_sizes(argument: str, sizes: int | Sequence[int], count: int) -> tuple[int, ...]:
    """``sizes`` as ``count`` integers of at least 1; an int is repeated.

    Raises:
        LayoutError: Not integers, below 1, none at all, or not ``count`` of them.
    """
    try:
        if isinstance(sizes, (str, bool)):
            raise TypeError
        listed = (
            [operator.index(size) for size in sizes]
            if isinstance(sizes, (Sequence, Tensor, np.ndarray))
            else [operator.index(sizes)] * count
        )
    except TypeError:
        raise LayoutError(
            f"{argument} must be an integer or a sequence of integers, got {sizes!r}"
        ) from None
    if len(listed) != count:
        raise LayoutError(f"{argument} must have {count} entries, got {len(listed)}: {listed}")
    if not listed or min(listed) < 1:
        raise LayoutError(f"{argument} must hold integers of at least 1, got {listed}")
    return tuple(listed)


def plain_tensor(argument: str, value: Tensor) -> Tensor:
    """``value`` as a dense tensor on the CPU, sparse tensors and nested sequences included.

    Raises:
        LayoutError: ``value`` is no tensor of numbers whose values are known.
    """
    if not isinstance(value, Tensor):
        try:  # as_tensor would follow ``with torch.device("meta")``
            return torch.tensor(value, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise LayoutError(
                f"{argument} must be a tensor or an array of numbers, got {value!r:.80}"
            ) from None
    kinds = {
        "a nested tensor": value.is_nested,
        "a quantized tensor": value.is_quantized,
        "a meta tensor, which has no values": value.is_meta,
        "a complex tensor": value.is_complex(),
    }
    for kind, given in kinds.items():
        if given:
            raise LayoutError(f"{argument} must be a plain tensor of numbers, got {kind}")
    value = value.detach()
    return (value if value.layout == torch.strided else value.to_dense()).cpu()


def _bool_matrix(argument: str, value: Tensor, shape: tuple[int, int]) -> Tensor:
    matrix = plain_tensor(argument, value)
    if matrix.dtype != torch.bool or tuple(matrix.shape) != shape:
        raise LayoutError(
            f"{argument} must be a bool matrix of row blocks x column blocks, {shape}, got "
            f"{matrix.dtype} {tuple(matrix.shape)}"
        )
    return matrix.clone(memory_format=torch.contiguous_format)


def _refuse_absent_routes(routed: Tensor, present: Tensor, what: str) -> None:
    wrong = (routed & ~present).nonzero()
    if wrong.numel():
        raise LayoutError(
            f"a gradient cannot flow through an absent {what}, but {len(wrong)} are routed and "
            f"absent, the first at (row, column) {tuple(wrong[0].tolist())}"
        )


def _order(argument: str, order: Tensor | None, size: int) -> Tensor | None:
    if order is None:
        return None
    order = plain_tensor(argument, order).to(torch.int64)
    if not torch.equal(order.sort().values, torch.arange(size, device="cpu")):
        raise LayoutError(f"{argument} must be a permutation of 0..{size - 1}")
    if torch.equal(order, torch.arange(size, device="cpu")):
        return None
    return order.clone()


def _mask_array(argument: str, mask: Tensor) -> np.ndarray[Any, np.dtype[np.bool_]]:
    array = plain_tensor(argument, mask)
    if array.dim() != 2 or 0 in array.shape:
        raise LayoutError(
            f"{argument} must be (out, in) with at least one row and one column, got "
            f"{tuple(array.shape)}"
        )
    if array.dtype != torch.bool:
        if not ((array == 0) | (array == 1)).all():
            raise LayoutError(f"{argument} must hold booleans or zeros and ones")
        array = array.bool()
    return array.contiguous().numpy()


def _turned(mask: np.ndarray[Any, np.dtype[np.bool_]]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return torch.from_numpy(mask).t().contiguous().numpy()  # torch transposes in blocks: 20x


def _pick(
    mask: np.ndarray[Any, np.dtype[np.bool_]], rows: list[int], cols: list[int]
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return mask if len(rows) * len(cols) == mask.size else mask[np.ix_(rows, cols)]


def _classes(
    signatures: np.ndarray[Any, np.dtype[np.uint8]], visible: np.ndarray[Any, Any]
) -> tuple[list[np.ndarray[Any, np.dtype[np.int64]]], Tensor | None]:
    """Members of each class of equal signatures, and the order that puts them side by side.

    Args:
        signatures: ``(units, bytes)``; equal rows are one class.
        visible: Number of true entries of each unit, ``(units,)``.
    """
    numbers: dict[bytes, int] = {}
    label = np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in signatures])
    starts = np.flatnonzero(np.r_[True, label[1:] != label[:-1]])
    if len(starts) <= 2 * len(numbers):
        # Equal neighbours already form few blocks: no unit has to move.
        return np.split(np.arange(len(label)), starts[1:]), None
    members = np.split(np.argsort(label, kind="stable"), np.cumsum(np.bincount(label))[:-1])
    # Widest first: where masks are nested (MADE), each unit then sees one run of features.
    members.sort(key=lambda units: (-int(visible[units[0]]), int(units[0])))
    return members, torch.from_numpy(np.concatenate(members))
