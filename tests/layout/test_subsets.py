"""Families of subsets: the order that inclusion gives, names, the layouts they induce."""

import copy
import pickle
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskmoe_kernels as mk
from maskmoe_kernels.testing import strategies

PAPER = mk.SubsetFamily(
    groups={"user": 64, "item": 64, "content": 32},
    subsets={
        "cb": ["content"],
        "user": ["content", "user"],
        "item": ["content", "item"],
        "all": ["content", "user", "item"],
    },
)


def sets_of(family):
    return [frozenset(members) for members in family.subsets.values()]


def test_the_papers_family():
    assert (PAPER.num_groups, PAPER.num_experts, PAPER.in_features) == (3, 4, 160)
    assert PAPER.names == ["cb", "user", "item", "all"]
    assert PAPER.membership.int().tolist() == [[0, 0, 1], [1, 0, 1], [0, 1, 1], [1, 1, 1]]
    assert PAPER.inclusion.int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 0, 1, 0],
        [1, 1, 1, 1],
    ]
    edges = {("cb", "user"), ("cb", "item"), ("user", "all"), ("item", "all")}
    assert set(PAPER.hasse_edges()) == edges
    assert PAPER.rank().tolist() == [0, 1, 1, 2]
    assert PAPER.has_larger.tolist() == [True, True, True, False]


@given(strategies.families())
def test_inclusion_is_the_order_of_sets(family):
    sets = sets_of(family)
    for i, larger in enumerate(sets):
        assert family.inclusion[i].tolist() == [smaller <= larger for smaller in sets]
        assert family.strict[i].tolist() == [smaller < larger for smaller in sets]
    assert family.has_larger.tolist() == [any(a < b for b in sets) for a in sets]
    for row, members in zip(family.membership.tolist(), sets, strict=True):
        assert {g for g, there in zip(family.groups, row, strict=True) if there} == members


@given(strategies.families())
def test_hasse_edges_are_the_nearest_and_generate_the_rest(family):
    sets = dict(zip(family.names, sets_of(family), strict=True))
    edges = family.hasse_edges()
    assert len(edges) == len(set(edges))
    for small, large in edges:
        assert sets[small] < sets[large]
        assert not any(sets[small] < middle < sets[large] for middle in sets.values())
    reached = torch.eye(family.num_experts, dtype=torch.bool)
    at = {name: k for k, name in enumerate(family.names)}
    for _ in family.names:
        for small, large in edges:
            reached[at[large]] |= reached[at[small]]
    assert torch.equal(reached, family.inclusion)


@given(strategies.families())
def test_rank_is_the_longest_chain_below(family):
    rank = family.rank().tolist()
    for i, row in enumerate(family.strict.tolist()):
        below = [rank[j] for j, there in enumerate(row) if there]
        assert rank[i] == (1 + max(below) if below else 0)


@given(strategies.families(), st.data())
def test_layouts_follow_the_sets(family, data):
    widths = data.draw(
        st.lists(st.sampled_from([1, 2, 7]), min_size=len(family.names), max_size=len(family.names))
    )
    first, hidden = family.input_layout(widths), family.hidden_layout(widths, 2)
    assert torch.equal(first.present, family.membership)
    assert first.routes_all
    assert first.col_sizes == tuple(family.groups.values())
    assert torch.equal(hidden.present, family.inclusion)
    assert torch.equal(hidden.routes_grad, torch.eye(len(widths)).bool())
    assert (hidden.row_sizes, hidden.col_sizes) == ((2,) * len(widths), tuple(widths))
    visible = family.visible_features()
    assert torch.equal(first.mask(), visible.repeat_interleave(torch.tensor(widths), 0))
    # What a unit of the second layer sees through the first: its own subset, nothing else.
    through = hidden.mask().float() @ first.mask().float() > 0
    assert torch.equal(through, visible.repeat_interleave(2, 0))


@given(strategies.families())
def test_strict_input_trains_by_the_smallest_subsets(family):
    sets, groups = sets_of(family), list(family.groups)
    layout = family.input_layout(1, strict=True)
    for i, members in enumerate(sets):
        for n, group in enumerate(groups):
            smallest = group in members and not any(s < members and group in s for s in sets)
            assert bool(layout.routes_grad[i, n]) == smallest
    assert torch.equal(layout.present, family.membership)


@given(strategies.families())
def test_equality_hash_copy_and_pickle(family):
    for other in (copy.deepcopy(family), pickle.loads(pickle.dumps(family))):
        assert other == family
        assert hash(other) == hash(family)
        assert other.names == family.names
        assert torch.equal(other.strict, family.strict)
    bigger = mk.SubsetFamily({**family.groups, "one more": 1}, family.subsets)
    assert bigger != family
    assert family != "a family"


def test_order_is_the_users():
    family = mk.SubsetFamily({"b": 1, "a": 2}, {"z": ["a", "b"], "y": ["a"]})
    assert list(family.groups) == ["b", "a"]
    assert family.names == ["z", "y"]
    assert family.subsets["z"] == ("b", "a")  # the order of the input
    assert family.visible_features().int().tolist() == [[1, 1, 1], [0, 1, 1]]


@pytest.mark.parametrize(
    ("sizes", "count"), [({}, 15), ({"min_size": 0}, 16), ({"max_size": 2}, 10)]
)
def test_powerset(sizes, count):
    family = mk.SubsetFamily.powerset(dict.fromkeys("abcd", 3), **sizes)
    assert family.num_experts == count
    lengths = [len(members) for members in family.subsets.values()]
    assert lengths == sorted(lengths)
    assert family.names[-1] == ("a+b+c+d" if "max_size" not in sizes else "c+d")


def test_large_families_are_quick():
    start = time.perf_counter()
    family = mk.SubsetFamily.powerset({f"x{n}": 8 for n in range(8)})
    layout = family.hidden_layout(8, 8)
    assert (family.num_experts, layout.num_blocks) == (255, 3**8 - 2**8)
    assert time.perf_counter() - start < 2  # a tenth of it on an idle machine
    assert mk.SubsetFamily.powerset(dict.fromkeys("abcdefghij", 1)).num_experts == 1023


@pytest.mark.parametrize(
    ("groups", "subsets", "message"),
    [
        ({"a": 1}, {"x": ["a"], "y": ["a"]}, r"'x' and 'y' are both \['a'\]"),
        ({"a": 1}, {"x": [], "y": []}, r"'x' and 'y' are both \[\]"),
        ({"a": 1}, {"x": ["b"]}, r"'x' names the group 'b'.*\['a'\]"),
        ({"a": 1}, {"x": ["a", "a"]}, "'x' names a group twice"),
        ({"ab": 1}, {"x": "ab"}, r"the string 'ab'; write \['ab'\]"),
        ({"a": 0}, {"x": ["a"]}, r"groups must hold integers of at least 1, got \[0\]"),
        ({"a": 1.5}, {"x": ["a"]}, "groups must be"),
        ({}, {"x": []}, "0 groups"),
        ({"a": 1}, {}, "0 subsets"),
        (["a"], {"x": ["a"]}, "mapping"),
    ],
)
def test_bad_families_are_refused(groups, subsets, message):
    with pytest.raises(mk.LayoutError, match=message):
        mk.SubsetFamily(groups, subsets)


@pytest.mark.parametrize("sizes", [(-1, None), (3, 2), (1, 4)])
def test_bad_powersets_are_refused(sizes):
    with pytest.raises(mk.LayoutError, match="min_size"):
        mk.SubsetFamily.powerset({"a": 1, "b": 1, "c": 1}, *sizes)


def test_bad_widths_are_refused():
    with pytest.raises(mk.LayoutError, match=r"width must have 4 entries, got 2: \[3, 4\]"):
        PAPER.input_layout([3, 4])
    with pytest.raises(mk.LayoutError, match="out_width must hold integers of at least 1"):
        PAPER.hidden_layout(3, 0)


def test_with_top():
    family = mk.SubsetFamily({"a": 2, "b": 1, "c": 1}, {"b": ["b"], "ab": ["a", "b"]})
    top = family.with_top()
    assert top.subsets == {"b": ("b",), "ab": ("a", "b"), "all": ("a", "b", "c")}
    assert top.groups == family.groups
    assert top.with_top() is top
    named = mk.SubsetFamily({"a": 1, "b": 1}, {"all": ["a"]})
    with pytest.raises(mk.LayoutError, match=r"'all' is that of the expert that sees \['a'\]"):
        named.with_top()
    assert named.with_top("both").names == ["all", "both"]
