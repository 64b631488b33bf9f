"""Shapley values, interactions and Moebius coefficients against their definitions and laws."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskmoe_kernels as mk
from maskmoe_kernels.explain import interactions, moebius, shapley, shapley_residual
from maskmoe_kernels.testing import strategies
from tests.explain import definition

seeds = st.integers(0, 2**16)
NCF = mk.SubsetFamily(
    {"content": 2, "user": 3, "item": 1},
    {
        "content": ["content"],
        "user": ["content", "user"],
        "item": ["content", "item"],
        "all": ["content", "user", "item"],
    },
)


def powerset(count, min_size=1):
    return mk.SubsetFamily.powerset({f"g{n}": 1 for n in range(count)}, min_size)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shuffled(family, seed):
    """The same subsets in another order: columns may lie anyhow."""
    order = torch.randperm(family.num_experts, generator=torch.Generator().manual_seed(seed))
    names = [family.names[n] for n in order.tolist()]
    return mk.SubsetFamily(family.groups, {name: family.subsets[name] for name in names})


def game(family, row, base=None):
    """frozenset of group names -> value of one sample's row of logits, as Python floats."""
    table = {frozenset(s): float(v) for s, v in zip(family.subsets.values(), row, strict=True)}
    if base is not None:
        table[frozenset()] = float(base)
    return table.__getitem__


# --- The definitions ----------------------------------------------------------------------


@pytest.mark.parametrize("with_empty", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_power_sets_by_brute_force(count, with_empty):
    family = shuffled(powerset(count, 0 if with_empty else 1), count)
    logits = draw(2, family.num_experts, seed=count)
    base = None if with_empty else torch.tensor([0.25, -1.5], dtype=torch.float64)
    groups = list(family.groups)
    phi, pairs = shapley(logits, family, base), interactions(logits, family, base)
    coefficients = moebius(logits, family, base)
    for n in range(2):
        value = game(family, logits[n], None if base is None else base[n])
        expected = definition.by_permutations(value, groups)
        assert phi[n].tolist() == pytest.approx([expected[g] for g in groups], rel=0, abs=1e-10)
        for (i, p), (j, q) in itertools.combinations(enumerate(groups), 2):
            index = definition.interaction(value, groups, p, q)
            assert 2 * float(pairs[n, i, j]) == pytest.approx(index, rel=0, abs=1e-10)
        for k, subset in enumerate(family.subsets.values()):
            known = definition.moebius(value, frozenset(subset))
            assert float(coefficients[n, k]) == pytest.approx(known, rel=0, abs=1e-10)
    assert torch.equal(pairs, pairs.transpose(1, 2))
    torch.testing.assert_close(pairs.sum(-1), phi, rtol=0, atol=1e-12)


def test_an_expert_inside_all_others_is_the_base():
    """MovieLens: content is always there; user and item are the players."""
    logits = draw(3, 4)
    content, user, item, both = logits.unbind(-1)
    phi = shapley(logits, NCF)
    of_user = (user - content + both - item) / 2
    of_item = (item - content + both - user) / 2
    expected = torch.stack([torch.zeros(3, dtype=torch.float64), of_user, of_item], -1)
    torch.testing.assert_close(phi, expected, rtol=0, atol=1e-12)
    pairs = interactions(logits, NCF)
    torch.testing.assert_close(2 * pairs[:, 1, 2], both - user - item + content, rtol=0, atol=1e-12)
    assert not pairs[:, 0].any()
    assert not pairs[:, :, 0].any()
    torch.testing.assert_close(pairs.sum(-1), phi, rtol=0, atol=1e-12)


@given(strategies.families(), seeds)
def test_moebius_sums_back(family, seed):
    logits = draw(3, family.num_experts, seed=seed)
    coefficients = moebius(logits, family)
    back = coefficients @ family.inclusion.double().T
    torch.testing.assert_close(back, logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [5, 6, 7])
def test_the_fast_transform_is_the_product(count):
    from maskmoe_kernels.explain.shapley import _butterfly, _is_power_set, _product

    for family in (shuffled(powerset(count), 3), shuffled(powerset(count, 0), 4)):
        logits = draw(4, 2, family.num_experts, seed=count)
        assert _is_power_set(family)
        fast = _butterfly(logits, family)
        torch.testing.assert_close(fast, _product(logits, family), rtol=0, atol=1e-9)
        assert torch.equal(
            moebius(logits, family), fast if family.num_experts >= 63 else _product(logits, family)
        )


# --- Laws, over random games --------------------------------------------------------------


@given(st.integers(1, 5), seeds)
def test_efficiency(count, seed):
    family = shuffled(powerset(count), seed)
    logits, base = draw(4, family.num_experts, seed=seed), draw(4, seed=seed + 1)
    whole = family.membership.all(1).nonzero().item()
    total = shapley(logits, family, base).sum(-1)
    torch.testing.assert_close(total, logits[:, whole] - base, rtol=0, atol=1e-10)


@given(st.integers(2, 5), seeds)
def test_symmetry(count, seed):
    """Two groups that are worth the same beside any others get the same."""
    family = powerset(count)
    logits, swap = draw(family.num_experts, seed=seed), {"g0": "g1", "g1": "g0"}
    of = {frozenset(s): n for n, s in enumerate(family.subsets.values())}
    for subset, n in list(of.items()):
        logits[of[frozenset(swap.get(g, g) for g in subset)]] = logits[n]
    phi = shapley(logits, family, 0.0)
    torch.testing.assert_close(phi[0], phi[1], rtol=0, atol=1e-12)


@given(st.integers(2, 5), seeds)
def test_null_player(count, seed):
    """A group that never adds anything gets nothing, and interacts with nobody."""
    family = powerset(count)
    logits = draw(family.num_experts, seed=seed)
    of = {frozenset(s): n for n, s in enumerate(family.subsets.values())}
    for subset, n in of.items():
        rest = subset - {"g0"}
        logits[n] = logits[of[rest]] if rest else 0.5
    torch.testing.assert_close(
        shapley(logits, family, 0.5)[0], logits.new_zeros(()), rtol=0, atol=1e-12
    )
    assert interactions(logits, family, 0.5)[0].abs().max() < 1e-12


@given(st.integers(1, 4), seeds)
def test_linearity(count, seed):
    family = powerset(count)
    a, b = draw(2, family.num_experts, seed=seed), draw(2, family.num_experts, seed=seed + 1)
    for function in (shapley, interactions, moebius):
        mixed = function(2 * a - 3 * b, family, -1.0)
        apart = 2 * function(a, family, 1.0) - 3 * function(b, family, 1.0)
        torch.testing.assert_close(mixed, apart, rtol=0, atol=1e-10)


@given(st.integers(1, 4), seeds)
def test_values_that_only_add_up_have_no_interactions(count, seed):
    family, effect = powerset(count), draw(count, seed=seed)
    logits = 0.3 + family.membership.double() @ effect
    torch.testing.assert_close(shapley(logits, family, 0.3), effect, rtol=0, atol=1e-12)
    pairs = interactions(logits, family, 0.3)
    torch.testing.assert_close(pairs, effect.diag(), rtol=0, atol=1e-12)


# --- Outputs, types, gradients, missing values --------------------------------------------


@pytest.mark.parametrize("function", [shapley, interactions, moebius])
def test_each_of_several_outputs_is_a_game_of_its_own(function):
    family = powerset(3)
    logits, base = draw(5, 7, 2), draw(2, seed=9)
    result = function(logits, family, base)
    for k in range(2):
        alone = function(logits[..., k], family, base[k])
        torch.testing.assert_close(result[..., k], alone, rtol=0, atol=1e-12)


def test_two_axes_of_one_size_are_told_apart():
    family = powerset(2)
    logits = draw(5, 3, 3)
    with pytest.raises(mk.LayoutError, match=r"two axes of H=3.*dim=-1.*dim=-2"):
        shapley(logits, family, 0.0)
    by_last, by_second = (shapley(logits, family, 0.0, dim=dim) for dim in (-1, -2))
    assert by_last.shape == (5, 3, 2)
    torch.testing.assert_close(
        by_second, shapley(logits.transpose(1, 2), family, 0.0, dim=-1).transpose(1, 2)
    )
    assert shapley(draw(3, 3), family, 0.0).shape == (3, 2)  # a batch of three rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype):
    family = powerset(4)
    logits = draw(6, 15).to(dtype)
    for function in (shapley, interactions, moebius):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = function(logits, family, 0.0)
        assert result.dtype == torch.float32
        exact = function(logits.double(), family, 0.0)
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)


def test_gradients_are_the_weights():
    family = powerset(3)
    logits = draw(2, 7).requires_grad_()
    for function in (shapley, interactions, moebius):
        assert torch.autograd.gradcheck(lambda z, f=function: f(z, family, 0.5), logits)


@given(strategies.families(), seeds)
def test_a_nan_reaches_the_coefficients_that_contain_it(family, seed):
    logits = draw(2, family.num_experts, seed=seed)
    for i in range(family.num_experts):
        spoiled = logits.clone()
        spoiled[0, i] = torch.nan
        found = moebius(spoiled, family)
        assert not found[:, ~family.inclusion[:, i]].isnan().any()
        assert found[0, i].isnan()
        assert not found[1].isnan().any()


def test_a_nan_reaches_in_the_fast_transform():
    family = powerset(6)
    logits = draw(2, 63)
    i = family.names.index("g1+g4")
    logits[0, i] = torch.nan
    expected = torch.stack([family.inclusion[:, i], torch.zeros(63, dtype=torch.bool)])
    assert torch.equal(moebius(logits, family).isnan(), expected)


# --- Regression ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_regression_over_all_subsets_is_exact(count):
    family = shuffled(powerset(count), 2)
    logits = draw(3, family.num_experts)
    fitted = shapley(logits, family, 0.5, method="regression")
    torch.testing.assert_close(fitted, shapley(logits, family, 0.5), rtol=0, atol=1e-10)


def test_regression_by_least_squares():
    """Against a weighted solve of the same problem, written with the sum put in."""
    groups = {f"g{n}": 1 for n in range(4)}
    some = [
        ("g0",),
        ("g1",),
        ("g2",),
        ("g3",),
        ("g0", "g1"),
        ("g2", "g3"),
        ("g0", "g2"),
        tuple(groups),
    ]
    family = mk.SubsetFamily(groups, {"+".join(s): s for s in some})
    logits = draw(8)
    member = family.membership.double()
    size = family.membership.sum(1)
    weight = torch.tensor([0, 3 / 12, 3 / 24, 3 / 12, 0], dtype=torch.float64)[size]
    total = logits[-1] - 0.5
    # phi_3 = total - phi_0 - phi_1 - phi_2
    design = (member[:, :3] - member[:, 3:]) * weight.sqrt()[:, None]
    right = (logits - 0.5 - member[:, 3] * total) * weight.sqrt()
    free = torch.linalg.lstsq(design, right[:, None]).solution[:, 0]
    expected = torch.cat([free, (total - free.sum())[None]])
    fitted = shapley(logits, family, 0.5, method="regression")
    torch.testing.assert_close(fitted, expected, rtol=0, atol=1e-10)
    left = logits - 0.5 - member @ expected
    rms = ((weight * left.square()).sum() / weight.sum()).sqrt()
    torch.testing.assert_close(shapley_residual(logits, family, 0.5), rms, rtol=0, atol=1e-10)
    with pytest.raises(mk.LayoutError, match=r"7 are missing, \[\['g0', 'g3'\].*regression"):
        shapley(logits, family, 0.5)


def test_the_residual_of_an_additive_game_is_zero():
    family, effect = powerset(3), draw(3)
    logits = family.membership.double() @ effect
    assert float(shapley_residual(logits, family, 0.0)) < 1e-12
    logits[family.names.index("g0+g1")] += 1
    assert float(shapley_residual(logits, family, 0.0)) > 0.1


# --- What is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        (powerset(3), {}, r"value of the empty set is not known: pass base"),
        (powerset(3, 0), {"base": 0.0}, "expert 'none' sees no group"),
        (NCF, {"base": 0.0}, r"3 are missing, \[\['user'\], \['item'\]"),
        (powerset(3), {"base": torch.zeros(5)}, r"base must be .*\(2,\), got \(5,\)"),
        (powerset(3), {"base": 0.0, "method": "kernel"}, "method must be 'exact' or 'regression'"),
        (powerset(3), {"base": 0.0, "dim": 0}, "dim=0"),
        (
            mk.SubsetFamily({"a": 1, "b": 1}, {"a": ["a"], "b": ["b"]}),
            {"base": 0.0, "method": "regression"}, "no expert sees all groups",
        ),
        (
            mk.SubsetFamily({"a": 1, "b": 1, "c": 1}, {"a": ["a"], "all": ["a", "b", "c"]}),
            {"base": 0.0, "method": "regression"}, "do not determine",
        ),
    ],
)  # fmt: skip
def test_bad_arguments(family, arguments, message):
    with pytest.raises(mk.LayoutError, match=message):
        shapley(draw(2, family.num_experts), family, **arguments)


@pytest.mark.parametrize("function", [shapley, interactions, moebius])
@pytest.mark.parametrize(
    "logits",
    [torch.zeros(2, 6), torch.zeros(()), torch.zeros(2, 7, dtype=torch.int64), None, [0.0] * 7],
)
def test_bad_logits(function, logits):
    with pytest.raises(mk.LayoutError, match="logits must be"):
        function(logits, powerset(3), 0.0)


def test_without_a_player_there_is_nothing_to_share():
    family = mk.SubsetFamily({"a": 1}, {"a": ["a"]})
    assert shapley(draw(3, 1), family).tolist() == [[0.0]] * 3


@pytest.mark.parametrize("count", [3, 6])
def test_one_graph_of_torch_compile(count):
    family = powerset(count)
    logits = draw(5, family.num_experts, dtype=torch.float32)
    for function in (shapley, interactions, moebius, shapley_residual):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(logits, family, 0.5), function(logits, family, 0.5))
