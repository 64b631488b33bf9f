"""MLPs in bfloat16: by the processor's own products, of tiles (AMX) or of pairs (AVX512-BF16),
where the build has them, as that of ``make emulate``.

There, activations are rounded between layers; elsewhere they are float32.
"""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskmoe_kernels as mk
from maskmoe_kernels.layout.serialized import serialized_layout
from maskmoe_kernels.ops import native
from maskmoe_kernels.ops.masked_mlp.call import Inputs
from maskmoe_kernels.testing import assert_blind, assert_gradient_isolated, dense_oracle, strategies
from tests.ops.masked_mlp.test_masked_mlp import (
    ACTIVATIONS,
    CONFIDENCES,
    NORMALIZE,
    bits_of,
    losses,
    options_of_a_loss,
    same_bits,
    step,
)
from tests.ops.runners import OF_BFLOAT16

OWN = [isa for isa in native.isas() if isa.startswith(OF_BFLOAT16)]
VECTORS = next((isa for isa in native.isas() if isa not in OWN), "")  # what they leave others to
ISAS = OWN or native.isas()
WIDTHS = [1, 5, 8, 15, 16, 17, 32, 33, 48, 64, 100]
ROWS = [1, 2, 15, 16, 17, 31, 33, 65, 300]
FILLS = [torch.nan, torch.inf, -torch.inf, 3e38]
EPS = torch.finfo(torch.bfloat16).eps

pytestmark = pytest.mark.skipif(
    native.UNSUPPORTED_REASON is not None, reason=f"{native.UNSUPPORTED_REASON}"
)
own_products = pytest.mark.skipif(not OWN, reason="no products of bfloat16; `make emulate` has")
every_own = pytest.mark.parametrize("isa", OWN or [""])
isas = st.sampled_from(ISAS or [""])
widths = st.sampled_from(WIDTHS)
seeds = st.integers(0, 2**16)


def shuffled(net, seed):
    """The same MLP, with features and hidden units in any order."""
    generator = torch.Generator().manual_seed(seed)
    layouts = [layer.layout for layer in net.layers]
    orders = [torch.randperm(layout.in_features, generator=generator) for layout in layouts]
    made = [
        mk.BlockLayout(
            layout.row_sizes,
            layout.col_sizes,
            layout.present,
            layout.routes_grad,
            row_order=row_order,
            col_order=col_order,
        )
        for layout, row_order, col_order in zip(layouts, [*orders[1:], None], orders, strict=True)
    ]
    net.layers = mk.MaskedMLP(made, net.layers[0].activation)
    return net


@st.composite
def mlps(draw, max_experts=5, rows=ROWS):
    """An MLP with wide groups and layers, and a batch for it."""
    family = draw(strategies.families(max_experts))
    groups = {name: draw(widths) for name in family.groups}
    family = mk.SubsetFamily(groups, family.subsets)
    count = family.num_experts
    each = st.one_of(widths, st.lists(widths, min_size=count, max_size=count))
    hidden = draw(st.lists(each, max_size=3))
    torch.manual_seed(draw(seeds))
    native.set_isa(draw(isas))
    net = mk.InterpretableMLP(family, hidden, draw(st.sampled_from(ACTIVATIONS)))
    if draw(st.booleans()):
        net = shuffled(net, draw(seeds))
    net = net.bfloat16()
    assert net.layers.unsupported_reason() is None
    x = torch.randn(draw(st.sampled_from(rows)), family.in_features)
    return net, family, x.bfloat16()


def defined(net, x, parameters):
    """Logits in float64, with what own products keep between layers rounded."""
    weights, last = iter(parameters), len(net.layers) - 1
    for k, layer in enumerate(net.layers):
        x = dense_oracle(x, next(weights), next(weights), layer.layout, layer.activation)
        if k < last and native.isa() in OWN:
            x = x + (x.detach().bfloat16().double() - x.detach())
    return x


def close(ours, plain, true, noise=None, floor=4 * EPS):
    """By norm and by the largest error: twice those of another way, and a few roundings.

    A row left out of 300 changes a sum over them by 6 % of its norm, or so; 4 roundings are 3 %.
    Where a sum over samples cancels, they are roundings of ``noise``: see ``losses``.
    """
    for a, b, t, n in zip(ours, plain, true, noise or true, strict=True):
        assert a.shape == t.shape
        assert a.isfinite().all()
        for size in (torch.linalg.vector_norm, lambda d: d.abs().max() if d.numel() else 0):
            error, theirs = size(a.double() - t), size(b.double() - t)
            most = max(size(t), size(n))
            assert error <= 2 * theirs + floor * most + 1e-30, (error, theirs, size(t), size(n))


# --- The definition ------------------------------------------------------------------------------


@given(mlps(), seeds)
def test_equals_its_definition(case, seed):
    net, _, x = case
    torch.manual_seed(seed)
    leaves = [t.detach().double().requires_grad_() for t in (x, *net.parameters())]
    true = defined(net, leaves[0], leaves[1:])
    cotangent = torch.randn_like(true).bfloat16()
    expected = torch.autograd.grad(true, leaves, cotangent.double(), materialize_grads=True)
    x.requires_grad_()
    given_to, found = [x, *net.parameters()], []
    for logits in (net(x), net.layers.layered(x)):
        grads = torch.autograd.grad(logits, given_to, cotangent, materialize_grads=True)
        found.append([logits.detach(), *grads])
    with torch.no_grad():
        assert torch.equal(net(x), found[0][0])
    # Logits are rounded once; where what is summed cancels, float32 and ties of the hidden units.
    assert (found[0][0].double() - true).norm() <= EPS * true.norm() + 1e-3 * len(x) ** 0.5
    close(*found, [true.detach(), *expected])


@pytest.mark.parametrize("isa", native.isas())
def test_without_biases_is_as_with_zeros(isa):
    native.set_isa(isa)
    torch.manual_seed(0)
    family = mk.SubsetFamily.powerset({"a": 17, "b": 5, "c": 32})
    layouts = [layer.layout for layer in mk.InterpretableMLP(family, [33, 16], "gelu").layers]
    without, zeros = (mk.MaskedMLP(layouts, "gelu", bias=bias).bfloat16() for bias in (False, True))
    with torch.no_grad():
        for mine, theirs in zip(zeros, without, strict=True):
            mine.weight.copy_(theirs.weight)
            mine.bias.zero_()
    x = torch.randn(65, family.in_features).bfloat16().requires_grad_()
    found = []
    for net in (without, zeros):
        given_to = [x, *(layer.weight for layer in net)]
        y = net(x)
        found.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), given_to)])
    assert same_bits(*found)
    assert all(tensor.any() for tensor in found[0])


@given(mlps(), options_of_a_loss())
def test_the_loss_equals_that_of_its_definition(case, options):
    ours, plain, expected, noise = losses(case, defined, **options)
    close(ours, plain, expected, noise)
    assert (ours[0] - expected[0]).abs() <= 2e-3 * expected[0].abs() + 1e-5


@given(mlps(), st.sampled_from(CONFIDENCES), st.sampled_from([1.0, 0.7, 3.0]))
def test_the_mixture_equals_that_of_its_definition(case, confidence, sharpness):
    net, family, x = case
    with torch.no_grad():
        true = defined(net, x.double(), [p.double() for p in net.parameters()])
    expected = mk.mixture(true, family, confidence, sharpness)
    for a, t in zip(net.predict(x, confidence, sharpness), expected, strict=True):
        assert a.dtype == torch.float32
        assert (a - t).norm() <= 2e-3 * t.norm() + 1e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [257, 300, 1000])
def test_sums_go_on_from_tile_to_tile(activation, rows, isa):
    native.set_isa(isa)
    torch.manual_seed(rows)
    family = mk.SubsetFamily.powerset({"a": 40, "b": 64, "c": 16})
    net = mk.InterpretableMLP(family, [[48, 20, 32, 64, 17, 8, 33], 32], activation).bfloat16()
    x = torch.randn(rows, 120).bfloat16()
    leaves = [t.detach().double().requires_grad_() for t in (x, *net.parameters())]
    true = defined(net, leaves[0], leaves[1:])
    cotangent = torch.randn_like(true).bfloat16()
    expected = [true, *torch.autograd.grad(true, leaves, cotangent.double())]
    x.requires_grad_()
    logits = net(x)
    ours = [logits, *torch.autograd.grad(logits, [x, *net.parameters()], cotangent)]
    for a, t in zip(ours, expected, strict=True):
        assert (a.double() - t).norm() <= 0.01 * t.norm()


@pytest.mark.parametrize("isa", ISAS)
def test_a_sample_is_alone_in_every_batch(isa):
    native.set_isa(isa)
    torch.manual_seed(0)
    family = mk.SubsetFamily.powerset({"a": 33, "b": 20, "c": 48})
    net = mk.InterpretableMLP(family, [40, 32], "gelu").bfloat16()
    x = torch.randn(301, 101).bfloat16()
    with torch.no_grad():
        expected = net(x)
        for rows in range(1, 301, 13):
            assert torch.equal(net(x[:rows]), expected[:rows])
            assert torch.equal(net(x[rows]), expected[rows])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_activations_kept_or_computed_again_give_the_same_bits(activation, isa):
    native.set_isa(isa)
    call, grad = given_to_ops(activation)
    found = []
    for keep in (True, False):
        logits, saved = call.forward(keep)
        assert (saved.numel() > 0) == keep
        found.append([logits, *call.backward(grad, saved)])
    assert same_bits(*found)
    assert all(gradient.any() for gradient in found[0][1:])


@pytest.mark.parametrize(("kept", "read"), [*itertools.permutations(native.isas(), 2)])
def test_activations_kept_by_other_kernels_are_refused(kept, read):
    call, grad = given_to_ops("gelu")
    native.set_isa(kept)
    _, saved = call.forward(True)
    native.set_isa(read)
    with pytest.raises(RuntimeError, match="kept by other kernels"):
        call.backward(grad, saved)
    native.set_isa(kept)
    assert call.backward(grad, saved)[0].isfinite().all()


class Call:
    """The ops of an MLP, called as autograd calls them."""

    def __init__(self, net, x):
        self.activation = net.layers[0].activation
        plans = [serialized_layout(layer.layout, torch.device("cpu")) for layer in net.layers]
        self.plans = plans, [layer.layout.id for layer in net.layers]
        weights = [layer.weight.detach() for layer in net.layers]
        biases = [layer.bias.detach() for layer in net.layers]
        self.inputs = (x, [], [], [-x.shape[1]], weights, biases)
        self.experts = net.family.num_experts

    def forward(self, keep):
        op = torch.ops.maskmoe.masked_mlp
        return op(*self.inputs, *self.plans, self.experts, self.activation, keep)

    def backward(self, grad, saved):
        op = torch.ops.maskmoe.masked_mlp_backward
        return op(grad, *self.inputs, saved, *self.plans, self.activation, True, True, True)


def given_to_ops(activation):
    torch.manual_seed(0)
    family = mk.SubsetFamily.powerset({"a": 33, "b": 20})
    net = mk.InterpretableMLP(family, [40, 32], activation).bfloat16()
    return Call(net, torch.randn(200, 53).bfloat16()), torch.randn(200, 3).bfloat16()


# --- Laws ----------------------------------------------------------------------------------------


@given(mlps(rows=(1, 17)))
def test_experts_are_blind_outside_their_subset(case):
    net, family, x = case
    visible = family.visible_features()
    order = net.layers[0].layout.col_order
    if order is not None:  # feature order[n] stands where n stood
        visible = visible[:, order.argsort()]
    assert_blind(net, x, visible)


@given(mlps(rows=(1, 17)))
def test_each_loss_moves_its_own_expert(case):
    net, family, x = case
    assert_gradient_isolated(net, x, family)


@given(mlps(rows=(1, 33)), st.sampled_from(FILLS), seeds)
def test_what_an_expert_does_not_see_moves_none_of_its_bits(case, fill, seed):
    """Weights and biases of all layers, where a feature of one sample is anything at all."""
    net, family, x = case
    torch.manual_seed(seed)
    feature, row = seed % family.in_features, seed % len(x)
    cotangent = torch.randn(len(x), family.num_experts).bfloat16()
    spoilt = x.clone()
    spoilt[row, feature] = fill
    found = []
    for inputs in (x, spoilt):
        logits = net(inputs)
        found.append([logits, *torch.autograd.grad(logits, [*net.parameters()], cotangent)])
    layout = net.layers[0].layout
    sees = torch.zeros(family.num_experts, dtype=torch.bool)
    units = layout.mask()[:, feature]
    expert = torch.arange(family.num_experts).repeat_interleave(torch.tensor(layout.row_sizes))
    sees[expert[units if layout.row_order is None else units[layout.row_order]]] = True
    assert same_bits(*(logits[:, ~sees] for logits, *_ in found))
    for k, layer in enumerate(net.layers):
        of = torch.arange(family.num_experts)
        owner = of.repeat_interleave(torch.tensor(layer.layout.row_sizes))
        if layer.layout.row_order is not None:
            owner = owner[layer.layout.row_order.argsort()]
        sizes = torch.tensor(layer.layout.weight_offsets).diff()
        for offset, experts in ((1, of.repeat_interleave(sizes)), (2, owner)):
            before, after = (grads[2 * k + offset][~sees[experts]] for grads in found)
            assert torch.equal(before, after)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_what_a_mask_leaves_out_reaches_nothing(normalize, isa):
    native.set_isa(isa)
    torch.manual_seed(0)
    family = mk.SubsetFamily.powerset({"a": 33, "b": 20, "c": 48})
    net = mk.InterpretableMLP(family, [40, 32, 17], "silu").bfloat16()
    x, y, mask = torch.randn(300, 101).bfloat16(), torch.rand(300).round(), torch.rand(300) < 0.5
    options = {"normalize": normalize, "mask": mask}
    expected = step(net, x, y, **options)
    assert same_bits(expected, step(net, x, y, **options))  # and the same twice
    for fill in FILLS:
        spoilt = x.masked_fill(~mask[:, None], fill)
        found = step(net, spoilt, y.masked_fill(~mask, fill), **options)
        assert same_bits(expected, found)
        assert not found[1][~mask].any()
        assert found[1][mask].any(1).all()


# --- Tables --------------------------------------------------------------------------------------


@given(st.lists(widths, min_size=1, max_size=3), isas, st.sampled_from(ROWS), seeds)
def test_rows_of_tables_are_those_gathered(columns, isa, rows, seed):
    """Logits bit for bit; gradients as near to the truth as those of the gathered rows."""
    native.set_isa(isa)
    torch.manual_seed(seed)
    groups = {f"g{n}": width for n, width in enumerate([*columns, 20])}
    family = mk.SubsetFamily.powerset(groups)
    net = mk.InterpretableMLP(family, [33, 16], "tanh").bfloat16()
    tables = [torch.randn(7, n).bfloat16().requires_grad_() for n in columns]
    ids = [torch.randint(7, (rows,)) for _ in columns]
    x = torch.randn(rows, 20).bfloat16().requires_grad_()
    inputs = Inputs(x, tables, ids, (*range(len(columns)), -20))
    logits, gathered = net(inputs), inputs.joined()
    plain = net(gathered)
    assert torch.equal(logits, plain)
    double = [t.detach().double().requires_grad_() for t in (*tables, x)]
    joined = torch.cat([*(t[i] for t, i in zip(double[:-1], ids, strict=True)), double[-1]], 1)
    true = defined(net, joined, [p.double() for p in net.parameters()])
    cotangent = torch.randn_like(true).bfloat16()
    ours = torch.autograd.grad(logits, [*tables, x], cotangent)
    theirs = torch.autograd.grad(plain, [*tables, x], cotangent)
    expected = torch.autograd.grad(true, double, cotangent.double())
    close(ours, theirs, expected)
    assert same_bits([a == 0 for a in ours], [t == 0 for t in expected])


# --- Own products, and nothing else ---------------------------------------------------------------


def wide(hidden=(32, 32)):
    """One expert whose layers, all but the last, fill tiles; every weight zero."""
    net = mk.InterpretableMLP(mk.SubsetFamily({"a": 32}, {"e": ["a"]}), hidden, None).bfloat16()
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    return net


@own_products
@pytest.mark.parametrize("isa", native.isas())
def test_hidden_layers_are_multiplied_by_own_products(isa):
    """Own products take denormals for zero; those of float32 compute with them.

    Each product has one factor of 2^-130: the first layer's in the forward; in the backward those
    that give the second layer's weights and the first layer's units their gradients.
    """
    native.set_isa(isa)
    tiny, huge = 2.0**-130, 2.0**110
    net = wide()
    first, second, last = (layer.weight for layer in net.layers)
    with torch.no_grad():
        for weight in (first, second, last):
            weight.fill_(1)
        first.fill_(huge)
    x = torch.full((3, 32), tiny).bfloat16()
    one_by_one = net.layers[0](x).float()
    assert torch.equal(one_by_one, torch.full((3, 32), 0 if isa in OWN else 2.0**-15))
    assert net(x).any() == (isa not in OWN)

    with torch.no_grad():
        first.fill_(2.0**20)
        second.fill_(2.0**90)
        last.fill_(2.0**-100)
    x.fill_(1).requires_grad_()
    cotangent = torch.full((3, 1), 2.0**-30).bfloat16()
    # The gradient of the second layer's units is 2^-130.
    grads = torch.autograd.grad(net(x), [x, second, first], cotangent)
    assert [bool(grad.any()) for grad in grads] == [isa not in OWN] * 3


@own_products
@pytest.mark.parametrize("isa", native.isas())
def test_hidden_units_are_rounded_for_own_products_only(isa):
    """1 + 2^-10 less 1, after one layer: what is left was kept in float32."""
    native.set_isa(isa)
    net = wide([32])
    first, last = net.layers
    with torch.no_grad():
        dense = torch.zeros(32, 32)
        dense[0, 0] = dense[0, 1] = 1
        first.weight.copy_(first.layout.pack(dense))
        last.weight[0], last.bias[0] = 1, -1
    x = torch.zeros(5, 32)
    x[:, 0], x[:, 1] = 1, 2.0**-10
    left = 0.0 if isa in OWN else 2.0**-10
    assert torch.equal(net(x.bfloat16()).float(), torch.full((5, 1), left))


@own_products
@every_own
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_whole_lines_give_the_bits_of_layers_one_by_one(activation, isa):
    """Where every block fills its lines, an MLP adds up in the order of its layers."""
    native.set_isa(isa)
    torch.manual_seed(0)
    family = mk.SubsetFamily.powerset({"a": 32, "b": 64, "c": 96})
    net = mk.InterpretableMLP(family, [[32, 64, 32, 96, 32, 64, 64], 64, 32], activation)
    net = net.bfloat16()
    x = torch.randn(301, 192).bfloat16()
    with torch.no_grad():
        ours = net(x)
        assert torch.equal(ours, net.layers.layered(x))
        native.set_isa(VECTORS)
        assert not torch.equal(ours, net(x))


@own_products
@every_own
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_left_to_vectors(dtype, isa):
    torch.manual_seed(0)
    family = mk.SubsetFamily.powerset({"a": 33, "b": 20, "c": 48})
    net = mk.InterpretableMLP(family, [40, 32], "gelu").to(dtype)
    x, y = torch.randn(100, 101, dtype=dtype), torch.rand(100).round()
    found = []
    for name in (isa, VECTORS):
        native.set_isa(name)
        found.append([net(x), *step(copy.deepcopy(net), x, y, normalize="expert")])
    assert same_bits(*found)
    assert bits_of(found[0])[0].any()
