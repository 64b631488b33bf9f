"""The masked linear map against its definition: values, gradients, blindness, determinism."""

import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import maskmoe_kernels as mk
from maskmoe_kernels.ops.masked_linear.torch_impl import _schedule
from maskmoe_kernels.testing import assert_blind, assert_close_to_oracle, dense_oracle, strategies
from tests.ops.runners import DEVICE, DRAWN, INTERPRETED, QUICK, RUNNERS, masked_linear, select

ACTIVATIONS = [None, "relu", "leaky_relu", "gelu", "tanh", "silu"]
# Their derivative at a non-finite z times a zero cotangent is zero, not NaN.
FLAT = [None, "relu", "leaky_relu"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FILLS = [float("nan"), float("inf"), float("-inf"), 1e38]
ROWS = [0, 1, 15, 16, 17, 1000]

runners = st.sampled_from(DRAWN)


def on_all(
    names=("input", "hidden", "interleaved", "stairs", "random", "nothing"), few=("hidden",)
):
    """(name of a layout, runner): all of them, but few for the interpreter."""
    pairs = [(n, r) for n in names for r in RUNNERS if r not in INTERPRETED or n in few]
    return pytest.mark.parametrize(("name", "runner"), pairs, ids=[" ".join(p) for p in pairs])


activations = st.sampled_from(ACTIVATIONS)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**16)

NESTED = mk.SubsetFamily(
    {"a": 7, "b": 1, "c": 33},
    {"none": [], "a": ["a"], "ab": ["b", "a"], "c": ["c"], "all": ["a", "b", "c"]},
)
STRIPES = torch.arange(33)[:, None] % 3 >= torch.arange(34) % 4
RANDOM = torch.rand(33, 17, generator=torch.Generator().manual_seed(1)) < 0.4
RANDOM[5] = False
# Units of MADE, in no order: each sees the features of at most its degree.
DEGREES = torch.randperm(70, generator=torch.Generator().manual_seed(2)) * 90 // 70
STAIRS = DEGREES[:, None] >= torch.randperm(90, generator=torch.Generator().manual_seed(3))
ONE = mk.BlockLayout([1], [1], torch.ones(1, 1, dtype=torch.bool))
LAYOUTS = {
    "input": NESTED.input_layout([1, 7, 33, 7, 1]),
    "hidden": NESTED.hidden_layout([33, 7, 1, 16, 7], [7, 1, 33, 17, 1]),
    "interleaved": mk.BlockLayout.from_mask(STRIPES.repeat(2, 2)),
    "stairs": mk.BlockLayout.from_mask(STAIRS, STAIRS & (torch.arange(90) % 7 > 0)),
    "random": mk.BlockLayout.from_mask(RANDOM, RANDOM & (torch.arange(17) % 2 == 0)),
    "nothing": mk.BlockLayout([7, 1], [3, 2], torch.zeros(2, 2, dtype=torch.bool)),
}


def drawn(layout, rows, dtype=torch.float64, seed=0, bias=True):
    """x, weight and bias, random, on one seed."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(*rows, layout.in_features), (layout.num_weights,), (layout.out_features,)]
    tensors = [
        torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for s in shapes
    ]
    return tensors if bias else [*tensors[:2], None]


def on(runner):
    return lambda *args: masked_linear(*args, runner=runner)


def step(layout, x, weight, bias, cotangent, activation=None, runner=None):
    """Output and the three gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = masked_linear(*leaves, layout, activation, runner)
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent, materialize_grads=True)]


def bits(t):
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def same_bits(a, b):
    return a.shape == b.shape and torch.equal(bits(a), bits(b))


def fitting(fill, dtype):
    """``fill``, or the largest number that ``dtype`` has."""
    return min(fill, torch.finfo(dtype).max) if math.isfinite(fill) else fill


def test_the_examples_take_both_paths():
    """Runs of products and the dense fallback both stand behind the tests below."""
    dense = {name: _schedule(layout).dense for name, layout in LAYOUTS.items()}
    assert not dense["hidden"]
    assert not dense["interleaved"]
    assert dense["random"]
    assert LAYOUTS["interleaved"].row_order is not None
    assert LAYOUTS["stairs"].row_order is not None


# --- Invariant 3: one definition ---------------------------------------------------------------


@given(strategies.layouts(), runners, activations, dtypes, st.booleans(), st.integers(0, 4), seeds)
@example(LAYOUTS["hidden"], "torch", "gelu", torch.float32, True, 3, 0)
@example(LAYOUTS["interleaved"], "torch", "tanh", torch.bfloat16, True, 3, 0)
@example(LAYOUTS["nothing"], "torch", "relu", torch.float32, False, 2, 0)
def test_matches_oracle(layout, runner, activation, dtype, bias, rows, seed):
    inputs = drawn(layout, (rows,), dtype, seed, bias)
    assert_close_to_oracle(on(runner), *inputs, layout, activation, seed=seed)


def row_counts():
    """(name of a layout, runner, dtype, rows): all of them, but few for the interpreter.

    There, float64 goes to PyTorch, and the kernels cut rows of all layouts alike.
    """
    kept = {"input": (1, 17), "interleaved": (1, 17), "hidden": (0, 1, 16, 17, 40)}
    return [
        pytest.param(name, runner, dtype, rows, id=f"{name} {runner}-{rows}-{dtype}")
        for name in LAYOUTS
        for runner in RUNNERS
        for dtype in (DTYPES[1:] if runner in INTERPRETED else DTYPES)
        for rows in (kept.get(name, ()) if runner in INTERPRETED else ROWS)
    ]


@pytest.mark.parametrize(("name", "runner", "dtype", "rows"), row_counts())
def test_matches_oracle_at_every_row_count(name, rows, dtype, runner):
    inputs = drawn(LAYOUTS[name], (rows,), dtype)
    assert_close_to_oracle(on(runner), *inputs, LAYOUTS[name], "silu")


@on_all()
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(name, activation, runner):
    rows = 5 if runner in INTERPRETED else 17  # one tile of rows: they are cut above
    for bias in (True, False):
        inputs = drawn(LAYOUTS[name], (rows,), torch.float32, bias=bias)
        assert_close_to_oracle(on(runner), *inputs, LAYOUTS[name], activation)


VIEWS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every second": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "offset": lambda x: torch.cat([x.new_zeros(3), x.flatten()])[3:].view_as(x),
    "expanded": lambda x: x[:1].expand(x.shape),
    "one value": lambda x: x[:1, :1].expand(x.shape),
    "reversed rows": lambda x: x.flip(0),
    "many dimensions": lambda x: x.view(2, 1, 4, -1).transpose(0, 2),
    "a vector": lambda x: x[0],
    "no rows": lambda x: x.view(2, 4, -1)[:, :0],
}


@on_all(few=("interleaved",))
@pytest.mark.parametrize("view", VIEWS)
def test_any_view_of_the_input(name, view, runner):
    layout = LAYOUTS[name]
    x, weight, bias = drawn(layout, (8,), torch.float32)
    x = VIEWS[view](x)
    assert_close_to_oracle(on(runner), x, weight, bias, layout, "tanh")


@given(strategies.layouts(), runners, seeds)
def test_parameters_and_cotangents_may_be_views(layout, runner, seed):
    x, weight, bias = drawn(layout, (3,), torch.float64, seed)
    cotangent = torch.randn(layout.out_features, 3, dtype=torch.float64, device=DEVICE).t()
    plain = step(layout, x, weight, bias, cotangent.contiguous(), "tanh", runner)
    strided = [torch.stack([t, t], -1)[..., 0] for t in (x, weight, bias)]
    leaves = [t.detach().requires_grad_() for t in strided]
    y = masked_linear(*leaves, layout, "tanh", runner)
    for ours, expected in zip(
        [y, *torch.autograd.grad(y, leaves, cotangent, materialize_grads=True)], plain, strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@given(strategies.layouts(), runners, activations, seeds)
def test_only_asked_for_gradients_are_given(layout, runner, activation, seed):
    x, weight, bias = drawn(layout, (2,), torch.float64, seed)
    cotangent = torch.randn(2, layout.out_features, dtype=torch.float64, device=DEVICE)
    every = step(layout, x, weight, bias, cotangent, activation, runner)
    for k in range(3):
        inputs = [t.detach().requires_grad_(j == k) for j, t in enumerate((x, weight, bias))]
        y = masked_linear(*inputs, layout, activation, runner)
        if not y.requires_grad:  # nothing is routed
            assert k == 0
            assert not layout.routes_grad.any()
            continue
        (grad,) = torch.autograd.grad(y, inputs[k], cotangent, materialize_grads=True)
        torch.testing.assert_close(grad, every[k + 1], rtol=1e-12, atol=1e-12)


# --- Invariant 1: absent is absent -------------------------------------------------------------


@pytest.mark.skipif(not INTERPRETED, reason="there is no interpreter here")
@settings(max_examples=max(1, settings().max_examples // 15))
@given(strategies.layouts(), activations, dtypes, st.booleans(), seeds)
def test_interpreted_kernels_are_blind(layout, activation, dtype, bias, seed):
    """As the next one; it fills in five values for every kind of unit, which takes long here."""
    assume(layout.in_features * layout.out_features <= 2000)
    assume(len(layout.mask().unique(dim=0)) <= 3)
    x, weight, bias = drawn(layout, (2,), dtype, seed, bias)
    assert_blind(
        lambda x: masked_linear(x, weight, bias, layout, activation, "triton"), x, layout.mask()
    )


@given(strategies.layouts(), st.sampled_from(QUICK), activations, dtypes, st.booleans(), seeds)
@example(LAYOUTS["random"], "torch", "relu", torch.float32, True, 0)
@example(LAYOUTS["hidden"], "torch", "gelu", torch.float16, True, 0)
def test_blind_bit_for_bit(layout, runner, activation, dtype, bias, seed):
    x, weight, bias = drawn(layout, (2,), dtype, seed, bias)
    assert_blind(
        lambda x: masked_linear(x, weight, bias, layout, activation, runner), x, layout.mask()
    )


@given(strategies.layouts(), runners, st.sampled_from(FLAT), st.sampled_from(FILLS), seeds)
@example(LAYOUTS["random"], "torch", "relu", float("inf"), 0)
def test_every_gradient_is_blind(layout, runner, activation, fill, seed):
    """With one feature spoilt, units that do not see it keep every bit of every gradient."""
    mask, routed = layout.mask().to(DEVICE), layout.grad_mask().to(DEVICE)
    x, weight, bias = drawn(layout, (3,), torch.float32, seed)
    feature = seed % layout.in_features
    blind = ~mask[:, feature]
    assume(blind.any())
    cotangent = torch.where(blind, torch.randn(3, layout.out_features, device=DEVICE), 0.0)
    spoilt = x.index_fill(1, torch.tensor([feature], device=DEVICE), fill)
    before = step(layout, x, weight, bias, cotangent, activation, runner)
    after = step(layout, spoilt, weight, bias, cotangent, activation, runner)
    assert same_bits(before[0][:, blind], after[0][:, blind])
    assert same_bits(before[1], after[1])  # grad_x, of the seeing units' zero cotangents too
    assert not after[1][:, ~(routed & blind[:, None]).any(0)].any()
    if not math.isfinite(fill):  # a cotangent of 0 is a number, times what the unit reads none
        reads = mask & (torch.arange(layout.in_features, device=DEVICE) == feature)
        assert torch.equal(after[2].isnan(), layout.pack(reads))
    of_blind = layout.pack(blind[:, None].expand_as(mask).contiguous())
    assert same_bits(before[2][of_blind], after[2][of_blind])
    assert same_bits(before[3], after[3])


@given(strategies.layouts(), runners, activations, st.sampled_from(FILLS), dtypes, seeds)
@example(LAYOUTS["random"], "torch", None, float("nan"), torch.float32, 0)
@example(LAYOUTS["random"], "torch", "relu", float("nan"), torch.float64, 0)
@example(ONE, "torch", "gelu", 1e38, torch.float16, 0)
def test_a_seen_value_does_arrive(layout, runner, activation, fill, dtype, seed):
    """Blindness must not hide what is seen: the dense path's bookkeeping against the oracle."""
    x, weight, bias = drawn(layout, (2,), dtype, seed)
    x[:, seed % layout.in_features] = fitting(fill, dtype)
    # An infinity is no number to all activations.
    if activation in FLAT:
        x[1, seed // 7 % layout.in_features] = float("inf")
        weight[seed % 3 :: 3] *= 0  # 0 * Inf is NaN, as in any dense product
    elif math.isinf(fill):
        return
    ours = masked_linear(x, weight, bias, layout, activation, runner)
    expected = dense_oracle(x, weight, bias, layout, activation)
    if math.isfinite(fill):
        # A sum that is too large for the type is infinite, that of two such ones may be NaN, and
        # gelu(-inf) is NaN, as in torch.
        finite = x.abs().where(x.isfinite(), 0)
        largest = dense_oracle(finite, weight.abs(), bias.abs(), layout)
        held = (largest <= torch.finfo(dtype).max) | expected.isnan()
        ours, expected = ours[held], expected[held]
    assert torch.equal(ours.isnan(), expected.isnan())
    if dtype == torch.float64:
        torch.testing.assert_close(ours, expected, equal_nan=True)
    elif not math.isfinite(fill):  # sums of the largest number may be infinite in ours alone
        assert torch.equal(ours.isposinf(), expected.isposinf())
        assert torch.equal(ours.isneginf(), expected.isneginf())


@given(strategies.layouts(), runners, st.sampled_from(FILLS), dtypes, seeds)
def test_a_spoilt_cotangent_stays_with_its_unit(layout, runner, fill, dtype, seed):
    unit = seed % layout.out_features
    mask, routed = layout.mask().to(DEVICE), layout.grad_mask().to(DEVICE)
    x, weight, bias = drawn(layout, (2,), dtype, seed)
    cotangent = torch.randn(2, layout.out_features, dtype=dtype, device=DEVICE)
    spoilt = cotangent.index_fill(1, torch.tensor([unit], device=DEVICE), fitting(fill, dtype))
    _, *before = step(layout, x, weight, bias, cotangent, None, runner)
    _, *after = step(layout, x, weight, bias, spoilt, None, runner)
    assert same_bits(before[0][:, ~routed[unit]], after[0][:, ~routed[unit]])
    others = torch.ones_like(mask)
    others[unit] = False
    assert same_bits(before[1][layout.pack(others)], after[1][layout.pack(others)])
    assert same_bits(before[2][others[:, 0]], after[2][others[:, 0]])
    if not math.isfinite(fill):  # and it does spoil all that is the unit's
        assert torch.equal(~after[0].isfinite(), routed[unit].expand_as(x))
        assert torch.equal(~after[1].isfinite(), layout.pack(mask & ~others))
        assert torch.equal(~after[2].isfinite(), ~others[:, 0])


@given(strategies.masks(), runners, st.sampled_from(FILLS), seeds)
def test_absent_weights_are_not_stored(mask, runner, fill, seed):
    torch.manual_seed(seed)
    mask = mask.to(DEVICE)
    dense = torch.nn.Linear(mask.shape[1], mask.shape[0], device=DEVICE)
    clean = mk.MaskedLinear.from_linear(dense, mask, backend=select(runner))
    with torch.no_grad():
        dense.weight.masked_fill_(~mask, fill)
    layer = mk.MaskedLinear.from_linear(dense, mask, backend=select(runner))
    x = torch.randn(3, mask.shape[1], device=DEVICE)
    assert same_bits(layer(x), clean(x))
    assert layer.dense_weight().isfinite().all()
    cotangent = torch.randn(3, mask.shape[0], device=DEVICE)
    for module in (layer, clean):
        module(x).backward(cotangent)
    assert same_bits(layer.weight.grad, clean.weight.grad)


# --- Invariant 4: the same result twice --------------------------------------------------------


@given(strategies.layouts(), runners, activations, dtypes, seeds)
def test_bitwise_equal_on_repeat(layout, runner, activation, dtype, seed):
    inputs = drawn(layout, (5,), dtype, seed)
    cotangent = torch.randn(5, layout.out_features).to(DEVICE, dtype)
    first = step(layout, *inputs, cotangent, activation, runner)
    # A layout that is equal, not identical, must also take the same path.
    again = mk.BlockLayout(
        layout.row_sizes, layout.col_sizes, layout.present, layout.routes_grad,
        row_order=layout.row_order, col_order=layout.col_order,
    )  # fmt: skip
    for other in (layout, again):
        second = step(other, *inputs, cotangent, activation, runner)
        assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


# --- Structure ---------------------------------------------------------------------------


@given(strategies.layouts(), seeds)
def test_jacobian_support_is_the_mask(layout, seed):
    """Of the forward, by differences; of the gradient, the routed part of it."""
    assume(layout.in_features * layout.out_features <= 4000)
    x, weight, bias = drawn(layout, (1,), torch.float64, seed)
    still = x.expand(layout.in_features, -1).contiguous()  # as the moved rows are
    moved = still + torch.eye(layout.in_features, dtype=torch.float64, device=DEVICE)
    change, before = (mk.masked_linear(t, weight, bias, layout) for t in (moved, still))
    change = change - before
    dense = layout.unpack(weight)
    torch.testing.assert_close(change.t(), dense, rtol=0, atol=1e-9)
    assert not change.t()[~layout.mask().to(DEVICE)].any()
    rows = x.expand(layout.out_features, -1).clone().requires_grad_()
    y = mk.masked_linear(rows, weight, bias, layout)
    eye = torch.eye(layout.out_features, dtype=torch.float64, device=DEVICE)
    (grad,) = torch.autograd.grad(y, rows, eye)
    torch.testing.assert_close(grad, dense * layout.grad_mask().to(DEVICE), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("entry", "bias"),
    [(1.0, -torch.inf), (1.0, torch.nan), (torch.nan, 0.0), (-torch.inf, 0.0), (torch.inf, 0.0)],
)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("runner", RUNNERS)
def test_keeps_what_weights_and_biases_make_of_infinity(entry, bias, value, runner):
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[5, 0] = False
    layout = mk.BlockLayout.from_mask(mask)
    dense = torch.ones(6, 6, device=DEVICE)
    dense[0, 2] = entry
    dense[1, 1] = torch.inf
    x = torch.ones(3, 6, device=DEVICE)
    x[0, 1] = value
    x[1, 0] = value  # unseen by the last unit
    arguments = x, layout.pack(dense), torch.full((6,), bias, device=DEVICE), layout
    expected = mk.testing.dense_oracle(*arguments).float()
    torch.testing.assert_close(masked_linear(*arguments, runner=runner), expected, equal_nan=True)
