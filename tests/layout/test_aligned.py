"""Layouts of several masks that agree on the order of the units between them."""

from itertools import pairwise

import torch
from hypothesis import event, given
from hypothesis import strategies as st

from maskmoe_kernels.layout.aligned import Place, aligned_layouts

CHAIN = [Place(0, 1), Place(1, 2), Place(2, 0)]
# What the third layer writes is added to what the first one wrote.
RESIDUAL = [Place(0, 1), Place(1, 2), Place(2, 1), Place(1, 0)]


def _masks(widths, seed):
    """Masks of a MADE whose units have degrees in no order."""
    generator = torch.Generator().manual_seed(seed)
    degrees = [torch.randint(1, 7, (n,), generator=generator) for n in widths]
    return [b[:, None] >= a for a, b in pairwise(degrees)]


def _check(masks, places, aligned):
    orders = {}
    for (layout, inner), mask, place in zip(aligned, masks, places, strict=True):
        assert torch.equal(layout.mask(), mask)
        inside = inner.layout
        assert inside.num_weights == layout.num_weights
        rows, cols = (
            torch.arange(n) if order is None or width == 0 else order
            for order, n, width in (
                (layout.row_order, mask.shape[0], place.writes),
                (layout.col_order, mask.shape[1], place.reads),
            )
        )
        weight = torch.randn(layout.num_weights)  # packed alike
        assert torch.equal(inside.unpack(weight), layout.unpack(weight)[rows][:, cols])
        for width, order, name in (
            (place.reads, cols, inner.reads),
            (place.writes, rows, inner.writes),
        ):
            if width == 0:
                assert name is None
                continue
            first, first_name = orders.setdefault(width, (order, name))
            assert torch.equal(order, first)
            assert name == first_name is not None


@given(st.lists(st.integers(1, 40), min_size=4, max_size=4), st.integers(0, 99))
def test_layers_in_a_row_agree(widths, seed):
    masks = _masks(widths, seed)
    aligned = aligned_layouts(masks, CHAIN)
    event("aligned" if aligned else "scattered")
    if aligned is not None:
        _check(masks, CHAIN, aligned)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_layers_whose_units_are_added_agree(width, within, seed):
    generator = torch.Generator().manual_seed(seed)
    outside, one, two = (torch.randint(1, 7, (n,), generator=generator) for n in (9, width, within))
    masks = [b[:, None] >= a for a, b in ((outside, one), (one, two), (two, one), (one, outside))]
    aligned = aligned_layouts(masks, RESIDUAL)
    event("aligned" if aligned else "scattered")
    if aligned is not None:
        _check(masks, RESIDUAL, aligned)


def test_orders_differ_where_networks_do():
    one, other = (aligned_layouts(_masks((7, 40, 30, 12), seed), CHAIN) for seed in (0, 1))
    _check(_masks((7, 40, 30, 12), 0), CHAIN, one)
    assert one[0].inner.writes != other[0].inner.writes
    assert one[0].layout.row_order is not None
    assert one[0].inner.layout.row_order is None


def test_a_layer_that_moves_nothing_is_itself_inside():
    sorted_masks = [torch.ones(16, 16).tril() > 0] * 3
    for layout, inner in aligned_layouts(sorted_masks, CHAIN):
        assert (inner.layout is layout) == (layout.row_order is layout.col_order is None)


def test_an_order_that_scatters_equal_units_is_not_taken():
    order = torch.arange(60)
    first = (order % 3)[:, None] >= torch.arange(3)
    second = torch.arange(2)[:, None] >= order % 2
    assert aligned_layouts([first, second], [Place(0, 1), Place(1, 0)]) is None
    assert aligned_layouts([first, second], [Place(0, 0), Place(0, 0)]) is not None
    third = (order % 2)[:, None] >= torch.arange(2)  # its units, beside those of the first
    assert aligned_layouts([first, third], [Place(0, 1), Place(0, 1)]) is None
