"""The assertions must fail on modules that leak and pass on modules that do not."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import maskmoe_kernels as mk
from maskmoe_kernels.testing import (
    assert_blind,
    assert_close_to_oracle,
    assert_gradient_isolated,
    dense_oracle,
    strategies,
)

FAMILY = mk.SubsetFamily(
    {"a": 2, "b": 3, "c": 1}, {"a": ["a"], "b": ["b"], "ab": ["a", "b"], "all": ["a", "b", "c"]}
)
VISIBLE = FAMILY.visible_features()
seeds = st.integers(0, 2**16)


class TimesZero(nn.Linear):
    """The masked layer that most libraries have: exact on finite input only."""

    def __init__(self, mask):
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask)

    def forward(self, x):
        return nn.functional.linear(x, self.mask * self.weight, self.bias)


class LeakyGradient(torch.autograd.Function):
    """An identity whose gradient smears over all features."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.flip(-1)


class Attached(nn.Module):
    """Experts as DESIGN wants them, but nobody detached: every block routes its gradient."""

    def __init__(self, family, width=5):
        super().__init__()
        hidden = family.hidden_layout(width, 1)
        self.layers = nn.Sequential(
            mk.MaskedLinear.from_layout(family.input_layout(width), activation="tanh"),
            mk.MaskedLinear.from_layout(
                mk.BlockLayout(hidden.row_sizes, hidden.col_sizes, hidden.present)
            ),
        )

    def forward(self, x):
        return self.layers(x)


def net(**options):
    torch.manual_seed(0)
    return mk.InterpretableMLP(FAMILY, hidden=[7, [1, 3, 2, 5]], **options)


def x_of(rows=4):
    return torch.randn(rows, FAMILY.in_features, generator=torch.Generator().manual_seed(3))


# --- assert_blind ------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh", "silu"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_blind_passes_on_the_network(activation, backend):
    assert_blind(net(activation=activation, backend=backend), x_of(), VISIBLE)


@given(strategies.families(max_experts=4), seeds)
def test_blind_passes_on_the_network_of_any_family(family, seed):
    model = mk.InterpretableMLP(family, hidden=[2])
    x = torch.randn(2, family.in_features, generator=torch.Generator().manual_seed(seed))
    assert_blind(model, x, family.visible_features())


def test_blind_takes_any_leading_shape_and_dropout():
    model = nn.Sequential(net(), nn.Dropout(0.5))
    state = torch.get_rng_state()
    assert_blind(model, x_of(6).view(2, 1, 3, -1), VISIBLE)
    assert_blind(model, x_of()[0], VISIBLE)
    assert torch.equal(torch.get_rng_state(), state)


def test_blind_fails_on_a_multiply_by_zero():
    mask = FAMILY.input_layout(3).mask()
    with pytest.raises(AssertionError, match=r"(?s)output \d+ depends on .*nan in every unseen"):
        assert_blind(TimesZero(mask), x_of(), mask)
    assert_blind(mk.MaskedLinear(6, 12, mask), x_of(), mask)


def test_blind_fails_on_a_dense_layer():
    with pytest.raises(AssertionError, match=r"may not see"):
        assert_blind(nn.Linear(6, 4), x_of(), VISIBLE)


def test_blind_fails_on_a_norm_over_the_whole_width():
    model = net().layers[0]
    visible = FAMILY.input_layout(7).mask()
    assert_blind(model, x_of(), visible)
    with pytest.raises(AssertionError, match="normalisation"):
        assert_blind(nn.Sequential(model, nn.LayerNorm(28)), x_of(), visible)
    with pytest.raises(AssertionError, match="may not see"):
        assert_blind(lambda x: model(x).softmax(-1), x_of(), visible)


def test_blind_fails_on_a_finite_leak_of_one_bit():
    model = net()
    leak = torch.tensor([2.0**-26, 0, 0, 0])  # of the last group into expert "a"
    with pytest.raises(AssertionError, match="output 0 depends on"):
        assert_blind(lambda x: model(x) + leak * x[..., -1:].nan_to_num(), x_of(), VISIBLE)


def test_blind_fails_on_a_gradient_that_leaks():
    model = net()
    with pytest.raises(AssertionError, match=r"gradient of .* feature \d, which they may not"):
        assert_blind(lambda x: model(LeakyGradient.apply(x)), x_of(), VISIBLE)


def test_blind_fails_on_a_gradient_that_depends_on_the_unseen():
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.scale = x[..., 5:].nan_to_num(1, 1, 1).clamp(-1, 1)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.scale

    model = net()
    with pytest.raises(AssertionError, match=r"to feature \d, which they see"):
        assert_blind(lambda x: model(Scaled.apply(x)), x_of(), VISIBLE)


def test_blind_judges_modules_without_a_gradient():
    assert_blind(lambda x: x.detach().double().float(), x_of(), torch.eye(6, dtype=torch.bool))
    with pytest.raises(AssertionError, match=r"output \d depends"):
        assert_blind(lambda x: x.detach().flip(-1), x_of(), torch.eye(6, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_blind_in_other_types(dtype):
    assert_blind(net(dtype=dtype), x_of().to(dtype), VISIBLE)


@pytest.mark.parametrize(
    ("x", "visible", "message"),
    [
        (torch.zeros(2, 5), VISIBLE, r"in=5.*\(4, 6\)"),
        (torch.zeros(2, 6), VISIBLE.float(), "must be bool"),
        (torch.zeros(2, 6), VISIBLE[:3], r"has 3 rows; it gave \(2, 4\)"),
        (torch.zeros(2, 6, dtype=torch.int64), VISIBLE, "floating-point"),
        (torch.zeros(0, 6), VISIBLE, "with rows"),
        (torch.full((2, 6), torch.nan), VISIBLE, "finite"),
        (None, VISIBLE, "NoneType"),
    ],
)
def test_blind_refuses_bad_arguments(x, visible, message):
    with pytest.raises(mk.LayoutError, match=message):
        assert_blind(net(), x, visible)


# --- assert_gradient_isolated ------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh", None])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_isolated_passes_on_the_network(activation, backend):
    assert_gradient_isolated(net(activation=activation, backend=backend), x_of(), FAMILY)


@given(strategies.families(), seeds)
def test_isolated_passes_on_the_network_of_any_family(family, seed):
    torch.manual_seed(seed)
    model = mk.InterpretableMLP(family, hidden=[2, 1], activation="tanh")
    assert_gradient_isolated(model, torch.randn(3, family.in_features), family)


def test_isolated_fails_without_detach():
    with pytest.raises(AssertionError, match=r"'layers\.0\.weight'.*expert") as caught:
        assert_gradient_isolated(Attached(FAMILY), x_of(), FAMILY)
    assert "routes_grad" in str(caught.value) or "detach" in str(caught.value)


def test_isolated_fails_without_detach_where_no_element_is_shared():
    """Expert "all" alone moves the units of "a": disjoint supports, but the wrong row block."""
    family = mk.SubsetFamily({"a": 2, "b": 1}, {"a": ["a"], "all": ["a", "b"]})
    model = Attached(family)
    with torch.no_grad():
        # Cut the logit of "a" off: its own parameters are then moved by nobody else.
        head = model.layers[1]
        head.weight[head.layout.weight_offsets[0] : head.layout.weight_offsets[1]] = 0
    with pytest.raises(AssertionError, match=r"expert 'all' moves row block 0.*expert 'a'"):
        assert_gradient_isolated(model, x_of()[:, :3], family)


def test_isolated_fails_on_dense_layers():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    with pytest.raises(AssertionError, match=r"'0\.weight': element \(\d, \d\)"):
        assert_gradient_isolated(model, x_of(), FAMILY)
    one_layer = nn.Linear(6, 4)  # each logit has a row of its own
    assert_gradient_isolated(one_layer, x_of(), FAMILY)


@pytest.mark.parametrize("interleave", [False, True])
def test_isolated_judges_row_blocks_of_interleaved_units(interleave):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    first = FAMILY.input_layout(3)
    second = FAMILY.hidden_layout(3, 1)
    orders = {"row_order": order} if interleave else {}
    shuffled = mk.BlockLayout(first.row_sizes, first.col_sizes, first.present, **orders)
    orders = {"col_order": order} if interleave else {}
    args = (second.row_sizes, second.col_sizes, second.present)
    layers = [
        nn.Sequential(
            mk.MaskedLinear.from_layout(shuffled, activation="tanh"),
            mk.MaskedLinear.from_layout(mk.BlockLayout(*args, routes, **orders)),
        )
        for routes in (second.routes_grad, second.present)
    ]
    assert_blind(layers[0], x_of(), VISIBLE)
    assert_gradient_isolated(layers[0], x_of(), FAMILY)
    with pytest.raises(AssertionError, match=r"expert 'ab'"):
        assert_gradient_isolated(layers[1], x_of(), FAMILY)


class WithEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.experts = net()

    def forward(self, ids, scale):
        return self.experts(self.table(ids) * scale)


def test_shared_parameters_are_named():
    model = WithEmbedding()
    inputs = (torch.tensor([[1, 2], [3, 0]]), torch.ones(6))
    with pytest.raises(AssertionError, match=r"'table\.weight'.*shared"):
        assert_gradient_isolated(model, inputs, FAMILY)
    assert_gradient_isolated(model, inputs, FAMILY, shared=["table.weight"])


def test_isolated_leaves_no_gradient_behind():
    model = net()
    assert_gradient_isolated(model, x_of(), FAMILY)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Linear(6, 3), {}, r"\(\*, 4\).*\(4, 3\)"),
        (nn.Linear(6, 4).requires_grad_(False), {}, "no parameter to judge"),
        (nn.Linear(6, 4), {"shared": ["bias", "weight"]}, "all is shared"),
        (nn.Linear(6, 4), {"shared": ["table"]}, r"\['table'\].*\['bias', 'weight'\]"),
    ],
)
def test_isolated_refuses_bad_arguments(model, options, message):
    with pytest.raises(mk.LayoutError, match=message):
        assert_gradient_isolated(model, x_of(), FAMILY, **options)


# --- the oracle --------------------------------------------------------------------------


def test_oracle_by_hand():
    """Two experts of one unit: the larger reads the smaller, whose gradient is stopped."""
    layout = mk.BlockLayout(
        [1, 1], [1, 1], torch.tensor([[1, 0], [1, 1]]).bool(), torch.eye(2).bool()
    )
    x = torch.tensor([[2.0, 3.0]], requires_grad=True)
    weight = torch.tensor([5.0, 7.0, 11.0], requires_grad=True)
    bias = torch.tensor([0.5, -100.0], requires_grad=True)
    y = dense_oracle(x, weight, bias, layout, "leaky_relu")
    assert y.dtype == torch.float64
    close = {"rel": 1e-12, "abs": 0}
    assert y.tolist() == [[10.5, pytest.approx(-0.53, **close)]]  # 0.01 * (2*7 + 3*11 - 100)
    y.backward(torch.tensor([[1.0, 10.0]], dtype=torch.float64))
    assert x.grad.tolist() == [[5.0, pytest.approx(1.1, rel=1e-6, abs=0)]]  # 7 * 0.1 is stopped
    assert weight.grad.tolist() == pytest.approx([2.0, 0.2, 0.3], rel=1e-6, abs=0)
    assert bias.grad.tolist() == pytest.approx([1.0, 0.1], rel=1e-6, abs=0)


@given(strategies.layouts(), seeds)
def test_oracle_equals_the_masked_dense_product(layout, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, layout.in_features, dtype=torch.float64, generator=generator)
    dense = torch.randn(
        layout.out_features, layout.in_features, dtype=torch.float64, generator=generator
    )
    expected = x @ (dense * layout.mask()).t()
    ours = dense_oracle(x, layout.pack(dense), None, layout)
    terms = x.abs() @ (dense * layout.mask()).abs().t()
    assert ((ours - expected).abs() <= 1e-14 * terms).all()


@given(strategies.layouts(), seeds)
def test_oracle_is_blind(layout, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, layout.in_features, generator=generator)
    weight = torch.randn(layout.num_weights, generator=generator)
    unit = seed % layout.out_features
    seen = layout.mask()[unit]
    results = []
    for value in (0.0, float("nan"), float("inf")):
        at = x.masked_fill(~seen, value).requires_grad_()
        y = dense_oracle(at, weight.requires_grad_(), None, layout, "relu")[:, unit]
        grads = torch.autograd.grad(y, [at, weight], torch.randn(2), materialize_grads=True)
        assert grads[0][:, ~layout.grad_mask()[unit]].count_nonzero() == 0
        results.append(y)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), torch.zeros(2), None), "in_features=2"),
        ((torch.zeros(2), torch.zeros(9), None), "packed"),
        ((torch.zeros(2), torch.zeros(2), torch.zeros(1)), r"\(2,\), got \(1,\)"),
    ],
)
def test_oracle_refuses_bad_arguments(arguments, message):
    layout = mk.BlockLayout([1, 1], [1, 1], torch.eye(2).bool())
    with pytest.raises(mk.LayoutError, match=message):
        dense_oracle(*arguments, layout)
    with pytest.raises(mk.LayoutError, match="softplus"):
        dense_oracle(torch.zeros(2), torch.zeros(2), None, layout, "softplus")


# --- assert_close_to_oracle --------------------------------------------------------------


def wrong(kind):
    def op(x, weight, bias, layout, activation):
        if kind == "attached":
            layout = mk.BlockLayout(layout.row_sizes, layout.col_sizes, layout.present)
        if kind == "shifted":
            x = torch.cat([x[:1], x[:-1]])
        y = mk.masked_linear(x, weight, bias, layout, activation)
        if kind == "leak":
            y = y + 1e-30 * x.sum(-1, keepdim=True)
        return y.float().double() if kind == "rounded" else y

    return op


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("right", None),
        ("attached", r"grad_x\[\d, \d+\]"),
        ("shifted", r"output\[\d, \d+\]"),
        ("rounded", r"output\[\d, \d+\]"),
        ("leak", r"grad_x.*structural zero"),
    ],
)
def test_close_to_oracle(kind, message):
    layout = FAMILY.hidden_layout(3, 2)
    if kind == "leak":  # only a feature that nobody routes can tell
        none = torch.zeros_like(layout.present)
        layout = mk.BlockLayout(layout.row_sizes, layout.col_sizes, layout.present, none)
    generator = torch.Generator().manual_seed(1)
    sizes = [(5, layout.in_features), (layout.num_weights,), (layout.out_features,)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]
    if message is None:
        assert_close_to_oracle(wrong(kind), *inputs, layout, "gelu")
        return
    with pytest.raises(AssertionError, match=message):
        assert_close_to_oracle(wrong(kind), *inputs, layout)


# --- strategies --------------------------------------------------------------------------


def test_strategies_name_the_extra():
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import maskmoe_kernels as mk\n"
        "try: mk.testing.strategies\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "maskmoe_kernels[test]" in done.stdout
    with pytest.raises(AttributeError, match="strategie_s"):
        mk.testing.strategie_s


def kinds_of(family):
    """The shapes that a family has, by name."""
    member, strict = family.membership, family.strict
    overlap = (member.float() @ member.float().T).bool()
    comparable = family.inclusion | family.inclusion.T
    others = ~torch.eye(family.num_experts, dtype=torch.bool)
    return {
        "one expert": family.num_experts == 1,
        "chain": bool(comparable.all()) and family.num_experts > 2,
        "deep chain": bool(comparable.all()) and family.num_experts > 12,
        "no strict inclusion": not strict.any() and family.num_experts > 1,
        "smaller before larger": bool(strict.tril().any()),
        "larger before smaller": bool(strict.triu().any()),
        "a prior among others": bool((~member).all(1).any()) and family.num_experts > 2,
        "a group that nobody sees": not member.any(0).all(),
        "antichain": not strict.any() and bool((overlap & others).any()),
        "disjoint": not (overlap & others).any() and family.num_experts > 2,
        "nested": bool((comparable | ~overlap).all())
        and not comparable.all()
        and bool(strict.any()),
        "empty subset": bool((~member).all(1).any()),
        "single group": family.num_groups == 1,
        "duplicate groups": family.num_groups > len(torch.unique(member.T, dim=0)),
        "power set": family.num_experts >= 2**family.num_groups - 1 and family.num_groups > 2,
        "more than 30 experts": family.num_experts > 30,
        "width 33": 33 in family.groups.values(),
        "widths 1 and 7": {1, 7} <= set(family.groups.values()),
    }


def layout_kinds_of(layout):
    return {
        "interleaved": layout.row_order is not None and layout.col_order is not None,
        "rows alone interleaved": layout.row_order is not None and layout.col_order is None,
        "columns alone interleaved": layout.row_order is None and layout.col_order is not None,
        "routes nothing": not layout.routes_grad.any() and layout.num_weights > 0,
        "one block": layout.present.numel() == 1,
        "rectangular": len({*layout.present.shape, layout.out_features, layout.in_features}) == 4,
        "routed apart": not layout.routes_all,
        "routes all": layout.routes_all,
        "false row": not layout.mask().any(1).all(),
        "false column": not layout.mask().any(0).all(),
        "width 1": 1 in layout.row_sizes,
        "width 7": 7 in layout.row_sizes,
        "width 33": 33 in layout.row_sizes,
        "no blocks": layout.num_weights == 0,
        "fine": not layout.has_blocks,
        "blocks": layout.has_blocks and layout.num_blocks > 3,
    }


def mask_kinds_of(mask):
    rows, cols = mask.shape
    sees = mask.sum(1)
    interleaved = mk.BlockLayout.from_mask(mask)
    nested = (mask[:, None] & ~mask).any(-1)  # entry (a, b): does a see what b does not?
    return {
        "all true": bool(mask.all()) and mask.numel() > 1,
        "all false": not mask.any() and mask.numel() > 1,
        "some rows false": bool((sees == 0).any() and (sees > 0).any()),
        "some columns false": bool((~mask.any(0)).any() and mask.any()),
        "interleaved rows": interleaved.row_order is not None,
        "interleaved columns": interleaved.col_order is not None,
        "nested rows": len(sees.unique()) > 3 and not (nested & nested.T).any(),
        "all rows differ": rows > 7 and len(torch.unique(mask, dim=0)) == rows,
        "one row": rows == 1 and cols > 1,
        "one column": cols == 1 and rows > 1,
        "largest": mask.shape == (33, 33),
        "not square": rows != cols,
    }


@pytest.mark.parametrize(
    ("strategy", "kinds"),
    [
        (strategies.families(), kinds_of),
        (strategies.layouts(), layout_kinds_of),
        (strategies.masks(), mask_kinds_of),
    ],
    ids=["families", "layouts", "masks"],
)
def test_strategies_reach_every_kind(strategy, kinds):
    from hypothesis import settings

    seen = {}

    @settings(max_examples=400, derandomize=True, database=None)
    @given(strategy)
    def look(drawn):
        for kind, there in kinds(drawn).items():
            seen[kind] = seen.get(kind, 0) + there

    look()
    assert min(seen.values()) >= 3, seen


@given(strategies.families(2), strategies.families(5), strategies.masks(3, 7))
def test_nothing_drawn_is_larger_than_asked_for(two, five, mask):
    assert two.num_experts <= 2
    assert five.num_experts <= 5
    assert mask.shape[0] <= 3
    assert mask.shape[1] <= 7


@given(strategies.masks())
def test_masks_are_masks(mask):
    assert mask.dtype == torch.bool
    assert torch.equal(mk.BlockLayout.from_mask(mask).mask(), mask)
