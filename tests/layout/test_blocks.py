"""Block layouts: exact for every mask, packed without absent blocks, equal by content."""

import copy
import pickle
import time
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskmoe_kernels as mk
from maskmoe_kernels.layout.blocks import PACKING_VERSION
from maskmoe_kernels.layout.serialized import serialized_layout, transposed_layout
from maskmoe_kernels.testing import strategies

seeds = st.integers(0, 2**16)


@given(strategies.layouts(), seeds)
def test_pack_and_unpack_are_inverse(layout, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (layout.out_features, layout.in_features)
    dense = torch.randn(shape, generator=generator)
    weight = layout.pack(dense)
    assert weight.shape == (layout.num_weights,)
    assert torch.equal(layout.unpack(weight), torch.where(layout.mask(), dense, 0.0))
    assert torch.equal(layout.pack(layout.unpack(weight)), weight)


@given(strategies.layouts(), seeds)
def test_absent_values_do_not_survive_packing(layout, seed):
    dense = torch.full((layout.out_features, layout.in_features), torch.nan)
    dense[layout.mask()] = torch.randn(layout.num_weights)
    assert layout.unpack(layout.pack(dense)).isfinite().all()


@given(strategies.layouts())
def test_packed_order_is_row_block_by_row_block(layout):
    """Feature by feature, the weights of its units: what kernels and checkpoints rely on."""
    number = torch.arange(layout.out_features * layout.in_features)
    number = number.view(layout.out_features, layout.in_features)
    packed = layout.pack(number)
    order, columns = layout.row_order, layout.col_order
    order = torch.arange(layout.out_features) if order is None else order
    columns = torch.arange(layout.in_features) if columns is None else columns
    for i, (size, fan_in) in enumerate(zip(layout.row_sizes, layout.row_fan_in, strict=True)):
        units = order[layout.row_offsets[i] : layout.row_offsets[i + 1]]
        start, stop = layout.weight_offsets[i : i + 2]
        assert stop - start == size * fan_in
        seen = columns[layout.mask()[units[0]][columns]]
        assert torch.equal(packed[start:stop].view(fan_in, size), number[units][:, seen].T)


@given(strategies.layouts(), seeds)
def test_pack_and_unpack_are_differentiable(layout, seed):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(layout.out_features, layout.in_features, generator=generator)
    cotangent = torch.randn(layout.num_weights, generator=generator)
    dense.requires_grad_()
    (grad,) = torch.autograd.grad(layout.pack(dense), dense, cotangent)
    assert torch.equal(grad, layout.unpack(cotangent))
    weight = torch.zeros(layout.num_weights, requires_grad=True)
    (grad,) = torch.autograd.grad(layout.unpack(weight), weight, dense.detach())
    assert torch.equal(grad, layout.pack(dense.detach()))


@given(strategies.layouts())
def test_counts(layout):
    mask, routed = layout.mask(), layout.grad_mask()
    assert layout.num_weights == int(mask.sum())
    assert layout.density == pytest.approx(mask.float().mean().item())
    assert layout.num_routed_weights == int(routed.sum())
    assert layout.num_blocks == int(layout.present.sum())
    assert layout.has_blocks == (layout.num_weights >= 16 * layout.num_blocks)
    assert layout.routes_all == torch.equal(mask, routed)
    assert not (routed & ~mask).any()
    assert [len(blocks) for blocks in layout.row_blocks()] == layout.present.sum(1).tolist()


@given(strategies.masks())
def test_from_mask_is_exact(mask):
    layout = mk.BlockLayout.from_mask(mask)
    assert torch.equal(layout.mask(), mask)
    assert torch.equal(layout.grad_mask(), mask)
    assert torch.equal(mk.BlockLayout.from_mask(mask.int()).mask(), mask)


@given(strategies.masks(), seeds)
def test_from_mask_keeps_the_gradients_mask(mask, seed):
    routed = mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.5)
    layout = mk.BlockLayout.from_mask(mask, routed)
    assert torch.equal(layout.mask(), mask)
    assert torch.equal(layout.grad_mask(), routed)


@given(strategies.layouts())
def test_from_mask_recovers_any_layout(layout):
    again = mk.BlockLayout.from_mask(layout.mask(), layout.grad_mask())
    assert torch.equal(again.mask(), layout.mask())
    assert torch.equal(again.grad_mask(), layout.grad_mask())
    assert again.num_weights == layout.num_weights


@given(strategies.families(max_experts=10), seeds)
def test_from_mask_finds_interleaved_blocks(family, seed):
    """However the units are shuffled, their blocks are found again."""
    plain = family.input_layout(8).mask()
    generator = torch.Generator().manual_seed(seed)
    rows, cols = (torch.randperm(size, generator=generator) for size in plain.shape)
    layout = mk.BlockLayout.from_mask(plain[rows][:, cols])
    assert torch.equal(layout.mask(), plain[rows][:, cols])
    assert len(layout.row_sizes) <= 2 * family.num_experts
    assert len(layout.col_sizes) <= 2 * len(torch.unique(family.membership.T, dim=0))


@given(strategies.layouts())
def test_equal_by_content(layout):
    for other in (pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout)):
        assert other == layout
        assert hash(other) == hash(layout)
        assert torch.equal(other.mask(), layout.mask())
        assert torch.equal(other.grad_mask(), layout.grad_mask())
    wider = mk.BlockLayout(
        [*layout.row_sizes, 1],
        layout.col_sizes,
        torch.cat([layout.present, torch.ones_like(layout.present[:1])]),
        col_order=layout.col_order,
    )
    assert wider != layout
    assert layout != "a layout"


def test_ids_do_not_change_between_releases():
    """Checkpoints and exported programs hold them: a new packing needs a new PACKING_VERSION."""
    layout = mk.BlockLayout([2, 3], [4, 1], torch.tensor([[1, 0], [1, 1]]).bool())
    assert layout.packing_id == 289_347_827_338_331_177
    assert layout.id == 4_509_593_900_445_777_176
    routed = mk.BlockLayout([2, 3], [4, 1], layout.present, torch.eye(2).bool())
    assert routed.packing_id == layout.packing_id  # routes order no weight
    assert routed.id != layout.id


def test_the_packing_of_interleaved_masks_does_not_change_between_releases():
    """A checkpoint's packed weights lie in this order. If a number changes, then so did the order:
    raise PACKING_VERSION, so that old checkpoints are refused, and put the new numbers here."""
    rows, cols = torch.arange(9)[:, None], torch.arange(10)
    made = {
        "made": (rows % 3 >= cols % 4, 4_249_817_330_375_146_952),
        "disjoint": (rows * 2 % 9 // 3 == cols * 3 % 10 // 4, 7_176_016_143_995_291_547),
        "false rows": ((rows % 3 > cols % 2) & (rows != 4), 1_397_738_732_606_961_106),
    }
    assert PACKING_VERSION == 2
    found = {}
    for name, (mask, _) in made.items():
        layout = mk.BlockLayout.from_mask(mask)
        assert layout.row_order is not None or layout.col_order is not None
        found[name] = layout.packing_id
    assert found == {name: expected for name, (_, expected) in made.items()}


@given(strategies.families(max_experts=8), strategies.families(max_experts=8))
def test_between_joins_by_inclusion_of_names(rows, cols):
    layout = mk.BlockLayout.between(rows, cols, row_width=2, col_width=3)
    for i, large in enumerate(rows.subsets.values()):
        for j, small in enumerate(cols.subsets.values()):
            assert bool(layout.present[i, j]) == (set(small) <= set(large))
    assert not (layout.routes_grad & ~layout.present).any()
    assert set(layout.row_sizes) == {2}
    assert set(layout.col_sizes) == {3}


@given(strategies.families(max_experts=12))
def test_between_a_family_and_itself_is_its_hidden_layout(family):
    layout = mk.BlockLayout.between(family, family, row_width=2, col_width=3)
    assert layout == family.hidden_layout(3, 2)


def test_between_routes_by_name_then_by_set():
    first = mk.SubsetFamily({"t": 1, "log": 1}, {"t": ["t"], "log": ["log"], "all": ["t", "log"]})
    second = mk.SubsetFamily({"t": 1, "new": 1}, {"mine": ["t"], "all": ["t", "new"]})
    layout = mk.BlockLayout.between(rows=second, cols=first, row_width=1, col_width=1)
    assert layout.present.int().tolist() == [[1, 0, 0], [1, 0, 0]]
    assert layout.routes_grad.int().tolist() == [[1, 0, 0], [0, 0, 0]]
    # The name decides where both could: "b" of the columns is the set of "a", and the name of "b".
    rows = mk.SubsetFamily({"t": 1, "u": 1}, {"a": ["t"], "b": ["t", "u"], "c": ["u"], "d": []})
    cols = mk.SubsetFamily({"t": 1, "u": 1}, {"b": ["t"], "c": ["t", "u"], "a": ["u"], "e": []})
    layout = mk.BlockLayout.between(rows, cols, row_width=1, col_width=1)
    assert layout.present.int().tolist() == [[1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]
    # "c" and "a" of the columns lie not inside the rows of their name: there, the set decides.
    assert layout.routes_grad.int().tolist() == [
        [0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1],
    ]  # fmt: skip
    with pytest.raises(mk.LayoutError, match="share none"):
        mk.BlockLayout.between(first, mk.SubsetFamily({"x": 1}, {"x": ["x"]}), 1, 1)


def test_a_mask_without_blocks_warns_and_is_exact():
    mask = torch.rand(300, 280, generator=torch.Generator().manual_seed(0)) < 0.5
    with pytest.warns(UserWarning, match=r"300 x 280 mask has 300 distinct rows.*dense product"):
        layout = mk.BlockLayout.from_mask(mask)
    assert torch.equal(layout.mask(), mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mk.BlockLayout.from_mask(mask[:9, :9])  # too small to care
        mk.BlockLayout.from_mask(torch.ones(300, 300).tril().repeat_interleave(8, 1)[:, :300] > 0)


@pytest.mark.parametrize("units", [256, 300])
@pytest.mark.parametrize("ordered", [True, False])
def test_units_that_see_nested_sets_are_sorted(units, ordered):
    """MADE with as many degrees as units: no two see the same, and panels still walk half."""
    generator = torch.Generator().manual_seed(0)
    degrees, features = torch.arange(units), torch.arange(280)
    if not ordered:
        degrees, features = (
            t[torch.randperm(len(t), generator=generator)] for t in (degrees, features)
        )
    mask = degrees[:, None] >= features
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is faster than a dense product
        layout = mk.BlockLayout.from_mask(mask)
    assert torch.equal(layout.mask(), mask)
    assert (layout.row_order is None) == (layout.col_order is None) == ordered
    assert layout.density < layout.walked_density < layout.density + 0.05


def test_panels_that_walk_everything():
    layout = mk.BlockLayout([16, 16], [1, 3], torch.tensor([[True, False], [True, True]]))
    assert layout.walked_density == (16 * 1 + 16 * 4) / 128 == layout.density
    diagonal = mk.BlockLayout.from_mask(torch.eye(17).bool())
    assert diagonal.walked_density == 17 / (2 * 17)


def test_units_of_fine_blocks_stay_where_sorting_saves_nothing():
    layout = mk.BlockLayout.from_mask(torch.rand(90, 90) < 0.5)
    assert layout.row_order is None
    assert layout.col_order is None


def test_a_large_mask_is_quick():
    units = torch.arange(4096)
    mask = units[:, None] % 32 >= units % 64  # interleaved, 32 x 32 classes
    start = time.perf_counter()
    layout = mk.BlockLayout.from_mask(mask)
    assert time.perf_counter() - start < 3  # a quarter of a second on an idle machine
    assert (len(layout.row_sizes), layout.num_weights) == (32, int(mask.sum()))


BLOCKS = torch.tensor([[True, False], [True, True]])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([0, 1], [1, 1], BLOCKS), {}, r"row_sizes must hold integers of at least 1, got \[0, 1\]"),
        (([], [1], BLOCKS[:0, :1]), {}, "row_sizes must hold integers"),
        (([1, 1], [1, 1.5], BLOCKS), {}, "col_sizes must be"),
        (([1, 1, 1], [1, 1], BLOCKS), {}, r"present must .*\(3, 2\), got torch\.bool \(2, 2\)"),
        (([1, 1], [1, 1], BLOCKS.int()), {}, r"present must be a bool matrix.*torch\.int32"),
        (([1, 1], [1, 1], BLOCKS, ~BLOCKS), {}, r"absent, the first at \(row, column\) \(0, 1\)"),
        (([1, 1], [1, 1], BLOCKS), {"row_order": torch.tensor([0, 0])}, "row_order must be a perm"),
        (([1, 1], [1, 1], BLOCKS), {"col_order": torch.tensor([0])}, "col_order must be a perm"),
    ],
)
def test_bad_layouts_are_refused(arguments, options, message):
    with pytest.raises(mk.LayoutError, match=message):
        mk.BlockLayout(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3),), r"mask must be \(out, in\).*got \(3,\)"),
        ((torch.ones(0, 3),), r"got \(0, 3\)"),
        ((torch.full((2, 2), 0.5),), "zeros and ones"),
        ((torch.ones(2, 2), torch.ones(2, 3)), r"grad_mask must have the shape .*\(2, 3\)"),
        ((torch.eye(2), torch.ones(2, 2)), r"absent entry.*\(0, 1\)"),
    ],
)
def test_bad_masks_are_refused(arguments, message):
    with pytest.raises(mk.LayoutError, match=message):
        mk.BlockLayout.from_mask(*arguments)


@pytest.mark.parametrize("width", [True, "8", 1.5, None])
def test_widths_that_are_no_integers_are_refused(width):
    family = mk.SubsetFamily({"a": 1}, {"a": ["a"]})
    with pytest.raises(mk.LayoutError, match=f"width must be an integer .* got {width!r}"):
        family.input_layout(width)


def test_bad_tensors_are_refused():
    layout = mk.BlockLayout([2, 1], [3, 1], BLOCKS)
    with pytest.raises(mk.LayoutError, match=r"dense must be .*\(3, 4\), got \(4, 3\)"):
        layout.pack(torch.zeros(4, 3))
    with pytest.raises(mk.LayoutError, match=r"\(10,\), got \(3, 4\); use layout\.pack"):
        layout.unpack(torch.zeros(3, 4))


def test_layouts_are_built_on_the_cpu_whatever_the_default_device():
    """A model made under ``torch.device("meta")`` has no memory; its layouts have their content."""

    def build():
        family = mk.SubsetFamily.powerset({"a": 2, "b": 3, "c": 1})
        mask = torch.tensor([[True, False, True], [False, True, False]], device="cpu")
        layouts = [
            family.input_layout(3),
            family.hidden_layout(2, 3),
            mk.BlockLayout.between(family, family, 2, 3),
            mk.BlockLayout.from_mask(mask),
        ]
        tables = [
            table
            for layout in layouts
            for table in (
                layout.weight_index(torch.device("cpu")),
                serialized_layout(layout, torch.device("cpu")),
                transposed_layout(layout)[0].mask(),
                transposed_layout(layout)[1],
                layout.mask(),
                layout.grad_mask(),
                torch.tensor(layout.num_routed_weights, device="cpu"),
            )
        ]
        tables += [family.membership, family.inclusion, family.strict, family.has_larger]
        tables += [family.rank(), family.visible_features()]
        return layouts, tables

    layouts, tables = build()
    with torch.device("meta"):
        others, again = build()
    for one, other in zip(tables, again, strict=True):
        assert torch.equal(one, other)
    assert [a.id for a in layouts] == [b.id for b in others]
