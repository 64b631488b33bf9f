"""Hypothesis strategies: families of subsets, block layouts, boolean masks.

Everything drawn is small enough for a test to run hundreds of examples, and ragged: widths of
1, 7 and 33 are as likely as any other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.subsets import SubsetFamily

#: Widths around the sizes kernels care about; wide ones only where blocks are few.
WIDTHS = (1, 2, 3, 7)
WIDE = (*WIDTHS, 16, 33)
_FEW = 5

Draw = st.DrawFn


@st.composite
def families(draw: Draw, max_experts: int = 40) -> SubsetFamily:
    """Families of every shape: nested, disjoint, chains, antichains, power sets, arbitrary ones.

    Also groups that always come together, a single group, and in every shape possibly an empty
    subset. Experts and groups come in any order, groups in ragged widths.

    Args:
        max_experts: Largest number of subsets, at least 2.
    """
    shape = draw(st.sampled_from(_SHAPES))
    count, subsets = shape(draw, max_experts)
    distinct = list(dict.fromkeys(subsets))[:max_experts]
    if 0 in distinct:
        distinct.remove(0)
    if draw(st.booleans()) or not distinct:
        distinct = [0, *distinct][:max_experts]  # the empty subset: a learned prior
    if len(distinct) <= _FEW:
        distinct = draw(st.permutations(distinct))
    widths = draw(_widths(count))
    groups = {f"x{n}": width for n, width in enumerate(widths)}
    return SubsetFamily(
        groups,
        {f"e{i}": [f"x{n}" for n in _members(bits)] for i, bits in enumerate(distinct)},
    )


@st.composite
def layouts(draw: Draw, max_experts: int = 12) -> BlockLayout:
    """Layouts from every constructor, ragged: input, hidden, between, ``from_mask``, direct.

    Among them interleaved units, units that see nothing, features that nobody sees, routed
    gradients anywhere between none and all of the present blocks.

    Args:
        max_experts: Largest number of experts of the families involved, at least 2.
    """
    return draw(st.sampled_from(_SOURCES))(draw, max_experts)


@st.composite
def masks(draw: Draw, max_rows: int = 33, max_cols: int = 33) -> Tensor:
    """Boolean masks ``(out, in)``: arbitrary, interleaved blocks, triangular, all true or false.

    Args:
        max_rows: Largest number of output units, at least 1.
        max_cols: Largest number of input features, at least 1.
    """
    sides = sorted({1, 2, 3, 7, 15, 16, 17, 33})
    rows = draw(st.sampled_from([s for s in sides if s <= max_rows]))
    cols = draw(st.sampled_from([s for s in sides if s <= max_cols]))
    kind = draw(st.sampled_from(["blocks", "rows", "triangular", "full", "none"]))
    if kind in ("full", "none"):
        return torch.full((rows, cols), kind == "full")
    if kind == "triangular":  # as in MADE: unit o sees features of a smaller degree
        degrees = st.integers(0, 4)
        row_degree = torch.tensor(draw(_listed(degrees, rows)))
        col_degree = torch.tensor(draw(_listed(degrees, cols)))
        return row_degree[:, None] > col_degree
    patterns = _listed(st.integers(0, 2**cols - 1), rows if kind == "rows" else min(rows, 4))
    bits = draw(patterns)
    if kind == "blocks":
        bits = [bits[k] for k in draw(_listed(st.integers(0, len(bits) - 1), rows))]
    return torch.tensor([[bool(row >> f & 1) for f in range(cols)] for row in bits])


def _members(bits: int) -> list[int]:
    return [n for n in range(bits.bit_length()) if bits >> n & 1]


def _listed(elements: st.SearchStrategy[int], count: int) -> st.SearchStrategy[list[int]]:
    return st.lists(elements, min_size=count, max_size=count)


def _widths(count: int) -> st.SearchStrategy[list[int]]:
    return _listed(st.sampled_from(WIDE if count <= _FEW else WIDTHS), count)


# A shape draws (number of groups, subsets as bit sets of groups).
Subsets = tuple[int, list[int]]


def _single(draw: Draw, top: int) -> Subsets:
    return 1, [1]


def _chain(draw: Draw, top: int) -> Subsets:
    count = draw(st.integers(1, top))
    return count, [2**k - 1 for k in range(1, count + 1)]


def _disjoint(draw: Draw, top: int) -> Subsets:
    experts = draw(st.integers(1, min(top, 12)))
    owner = draw(_listed(st.integers(0, experts - 1), draw(st.integers(1, 12))))
    subsets = [sum(1 << n for n, o in enumerate(owner) if o == e) for e in range(experts)]
    return len(owner), subsets


def _nested(draw: Draw, top: int) -> Subsets:
    # Intervals, each inside or apart from every other one: cut the widest again and again.
    count = draw(st.integers(2, 12))
    intervals = [(0, count)]
    for _ in range(draw(st.integers(1, 8))):
        first, last = draw(st.sampled_from(intervals))
        if last - first > 1:
            cut = draw(st.integers(first + 1, last - 1))
            intervals += [(first, cut), (cut, last)] if not _is_cut(first, last, intervals) else []
    return count, [(1 << last) - (1 << first) for first, last in intervals]


def _is_cut(first: int, last: int, intervals: list[tuple[int, int]]) -> bool:
    return any(first <= a and b <= last and (a, b) != (first, last) for a, b in intervals)


def _antichain(draw: Draw, top: int) -> Subsets:
    count = draw(st.integers(2, 6))
    size = draw(st.integers(1, count - 1))
    return count, [sum(1 << n for n in c) for c in itertools.combinations(range(count), size)]


def _powerset(draw: Draw, top: int) -> Subsets:
    count = draw(st.integers(1, max(1, min(5, (top + 1).bit_length() - 1))))
    return count, list(range(1, 2**count))


def _arbitrary(draw: Draw, top: int) -> Subsets:
    count = draw(st.integers(1, 8))
    most = min(top, 2**count - 1)
    return count, draw(
        st.lists(st.integers(1, 2**count - 1), min_size=1, max_size=most, unique=True)
    )


def _together(draw: Draw, top: int) -> Subsets:
    # Every second group is the twin of the one before it.
    count, subsets = _arbitrary(draw, top)
    twins = [sum(0b11 << 2 * n for n in _members(bits)) for bits in subsets]
    return 2 * count, twins


_SHAPES: list[Callable[[Draw, int], Subsets]] = [
    _single,
    _chain,
    _disjoint,
    _nested,
    _antichain,
    _powerset,
    _arbitrary,
    _together,
]


def _input(draw: Draw, top: int) -> BlockLayout:
    family = draw(families(top))
    return family.input_layout(draw(_widths(family.num_experts)), strict=draw(st.booleans()))


def _hidden(draw: Draw, top: int) -> BlockLayout:
    family = draw(families(top))
    widths = _widths(family.num_experts)
    return family.hidden_layout(draw(widths), draw(widths))


def _between(draw: Draw, top: int) -> BlockLayout:
    rows, cols = draw(families(top)), draw(families(top))
    widths = draw(_widths(rows.num_experts)), draw(_widths(cols.num_experts))
    return BlockLayout.between(rows, cols, *widths)  # x0 is a group of both


def _from_mask(draw: Draw, top: int) -> BlockLayout:
    mask = draw(masks())
    if draw(st.booleans()):
        return BlockLayout.from_mask(mask)
    columns = draw(_listed(st.integers(0, 1), mask.shape[1]))
    rows = draw(_listed(st.integers(0, 1), mask.shape[0]))
    routed = torch.tensor(rows)[:, None] != torch.tensor(columns)
    return BlockLayout.from_mask(mask, mask & routed)


def _direct(draw: Draw, top: int) -> BlockLayout:
    row_sizes, col_sizes = (draw(_widths(draw(st.integers(1, 4)))) for _ in range(2))
    # 0: absent, 1: present, 2: present and routed.
    states = st.lists(st.integers(0, 2), min_size=len(col_sizes), max_size=len(col_sizes))
    state = torch.tensor([draw(states) for _ in row_sizes])
    orders = [
        torch.randperm(size, generator=torch.Generator().manual_seed(seed)) if seed else None
        for size in (sum(row_sizes), sum(col_sizes))
        for seed in [draw(st.integers(0, 3))]
    ]
    return BlockLayout(
        row_sizes, col_sizes, state > 0, state > 1, row_order=orders[0], col_order=orders[1]
    )


_SOURCES: list[Callable[[Draw, int], BlockLayout]] = [
    _direct,
    _input,
    _hidden,
    _between,
    _from_mask,
]
