"""MLPs in one pass: the definition layer by layer, blindness, determinism, loss and all."""

import copy
import itertools
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import maskmoe_kernels as mk
from maskmoe_kernels.layout.serialized import serialized_layout
from maskmoe_kernels.models import InterpretableNCF, NCFSizes
from maskmoe_kernels.ops import native
from maskmoe_kernels.ops.masked_mlp.api import masked_mlp
from maskmoe_kernels.ops.masked_mlp.autograd import run
from maskmoe_kernels.ops.masked_mlp.call import Inputs
from maskmoe_kernels.testing import assert_blind, assert_gradient_isolated, dense_oracle, strategies
from tests.arrival import assert_arrives, experts_of
from tests.ops.runners import OF_BFLOAT16

ROOT = Path(__file__).resolve().parents[3]
ACTIVATIONS = [None, "relu", "leaky_relu", "gelu", "tanh", "silu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONFIDENCES = ["abs", "square", "smooth", "rare"]
# Near p = 0.3, "rare" magnifies the rounding of p; the others are exact to float32's smallest.
LEAST = dict.fromkeys(CONFIDENCES, 1e-36) | {"rare": 1e-6}
NORMALIZE = [None, "sample", "expert", "batch"]
WEIGHTINGS = ["selection", "deselection", "uniform"]
CUBE = mk.SubsetFamily.powerset({"a": 3, "b": 18, "c": 1})
RAGGED = [[1, 7, 33, 16, 2, 5, 17], [16] * 7]

pytestmark = pytest.mark.skipif(
    native.UNSUPPORTED_REASON is not None, reason=f"{native.UNSUPPORTED_REASON}"
)
isas = st.sampled_from(native.isas() or [""])
seeds = st.integers(0, 2**16)


@st.composite
def mlps(draw, dtypes=(torch.float32,), max_experts=9, rows=(0, 1, 15, 40)):
    """An MLP that runs as one op, and a batch for it."""
    family = draw(strategies.families(max_experts))
    count = family.num_experts
    width = st.sampled_from([1, 2, 7, 16, 33])
    each = st.one_of(width, st.lists(width, min_size=count, max_size=count))
    hidden = draw(st.lists(each, max_size=3))
    torch.manual_seed(draw(seeds))
    native.set_isa(draw(isas))
    net = mk.InterpretableMLP(family, hidden, draw(st.sampled_from(ACTIVATIONS)))
    net = net.to(draw(st.sampled_from(dtypes)))
    assert net.layers.unsupported_reason() is None
    x = torch.randn(draw(st.sampled_from(rows)), family.in_features)
    return net, family, x.to(net.layers[0].weight.dtype)


def oracle(net, x, parameters):
    """Logits in float64, layer by layer, each by its definition."""
    h, weights = x, iter(parameters)
    for layer in net.layers:
        h = dense_oracle(h, next(weights), next(weights), layer.layout, layer.activation)
    return h


def close(ours, plain, true):
    """As near to the truth as PyTorch in the same precision is, twice over."""
    for a, b, t in zip(ours, plain, true, strict=True):
        scale = t.abs().max() if t.numel() else 0
        eps = torch.finfo(a.dtype).eps
        error = (a.double() - t).abs().max() if t.numel() else 0
        theirs = (b.double() - t).abs().max() if t.numel() else 0
        assert error <= 2 * theirs + 4 * eps * scale + 1e-30, (error, theirs, scale)


def bits_of(tensors):
    return [t.detach().reshape(-1).view(torch.uint8) for t in tensors]


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(bits_of(a), bits_of(b), strict=True))


# --- The definition ------------------------------------------------------------------------------


@given(mlps(DTYPES), seeds)
def test_equals_the_layers_by_their_definition(case, seed):
    net, _, x = case
    torch.manual_seed(seed)
    leaves = [t.detach().double().requires_grad_() for t in (x, *net.parameters())]
    true = oracle(net, leaves[0], leaves[1:])
    cotangent = torch.randn_like(true).to(x.dtype).double()
    expected = [true, *torch.autograd.grad(true, leaves, cotangent)]
    x.requires_grad_()
    found = []
    for logits in (net(x), net.layers.layered(x)):
        given_to = [x, *net.parameters()]
        grads = torch.autograd.grad(logits, given_to, cotangent.to(logits.dtype))
        found.append([logits, *grads])
    with torch.no_grad():
        assert torch.equal(net(x), found[0][0])
    close(*found, expected)


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("rows", [0, 1, 55, 56, 57, 113, 700])
def test_every_row_count(isa, rows):
    native.set_isa(isa)
    torch.manual_seed(rows)
    net = mk.InterpretableMLP(CUBE, RAGGED, "tanh")
    x = torch.randn(rows, 22)
    plain = net.layers.layered(x)
    torch.testing.assert_close(net(x), plain, rtol=1e-5, atol=1e-6)
    for row in range(0, rows, 50):  # a sample's logits are its own, whatever is cut beside it
        assert torch.equal(net(x[row]), net(x)[row])


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_activations_kept_or_computed_again_give_the_same_bits(activation):
    """At this size nothing is kept; a batch cut from it keeps them."""
    torch.manual_seed(0)
    net = mk.InterpretableMLP(CUBE, [16, 16], activation)
    plans = [serialized_layout(layer.layout, torch.device("cpu")) for layer in net.layers]
    numbers = [layer.layout.id for layer in net.layers]
    weights = [layer.weight.detach() for layer in net.layers]
    biases = [layer.bias.detach() for layer in net.layers]
    x, grad = torch.randn(300, 22), torch.randn(300, 7)
    inputs = (x, [], [], [-22], weights, biases)
    forward, backward = torch.ops.maskmoe.masked_mlp, torch.ops.maskmoe.masked_mlp_backward
    found = []
    for keep in (True, False):
        logits, saved = forward(*inputs, plans, numbers, 7, activation, keep)
        assert (saved.numel() > 0) == keep
        grads = backward(grad, *inputs, saved, plans, numbers, activation, True, True, True)
        found.append([logits, *grads])
    assert same_bits(*found)
    large = x.repeat(300, 1)
    assert forward(large, *inputs[1:], plans, numbers, 7, activation, True)[1].numel() == 0


def test_views_and_leading_shapes():
    net = mk.InterpretableMLP(CUBE, [8])
    wide = torch.randn(4, 5, 44)[..., ::2]
    expected = net(wide.contiguous().reshape(20, 22)).reshape(4, 5, 7)
    assert torch.equal(net(wide), expected)
    assert torch.equal(net(wide.transpose(0, 1)), expected.transpose(0, 1))
    inside = torch.randn(9, 30)[:, 4:26]
    assert torch.equal(net(inside), net(inside.clone()))


def test_the_cpu_knows_float32_only():
    """torch's float32_matmul_precision is for products on other devices."""
    net = mk.InterpretableMLP(CUBE, [16, 16])
    x, y = torch.randn(60, 22), torch.rand(60).round()
    found = []
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            found.append([net(x), *step(net, x, y), *net.predict(x)])
    finally:
        torch.set_float32_matmul_precision(before)
    assert same_bits(*found)


# --- Laws ----------------------------------------------------------------------------------------


@given(mlps(DTYPES, max_experts=6, rows=(1, 15)))
def test_experts_are_blind_outside_their_subset(case):
    net, family, x = case
    assert_blind(net, x, family.visible_features())


@given(mlps(DTYPES, max_experts=6, rows=(1,)))
def test_what_an_expert_sees_arrives(case):
    net, family, x = case
    visible = family.visible_features()
    for way in (net, net.layers.layered):
        assert_arrives(way, x[0], visible)
    # One unknown expert leaves the prediction unknown; alpha says which it is. It is unknown to
    # an expert if that, or a strict subset, sees the feature: then it sees it itself.
    somebody = visible.any(0).expand_as(visible)
    assert_arrives(lambda x: net.predict(x).selection, x[0], visible)
    assert_arrives(lambda x: net.predict(x).attribution, x[0], somebody)
    assert_arrives(lambda x: net.predict(x).probability[:, None], x[0], somebody[:1])


@given(mlps(max_experts=8, rows=(1, 15)))
def test_each_loss_moves_its_own_expert(case):
    net, family, x = case
    assert_gradient_isolated(net, x, family)


def step(net, x, y, **options):
    net.zero_grad()
    x = x.detach().requires_grad_()
    loss = net.gem_loss(x, y, **options)
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_the_same_bits_twice(normalize):
    torch.manual_seed(0)
    net = mk.InterpretableMLP(CUBE, RAGGED)
    x, y = torch.randn(900, 22), torch.rand(900).round()
    first = step(net, x, y, normalize=normalize)
    for _ in range(3):
        assert same_bits(first, step(net, x, y, normalize=normalize))


@given(mlps(max_experts=6, rows=(1, 15)), st.sampled_from(WEIGHTINGS), st.booleans(), seeds)
def test_the_loss_of_an_expert_is_blind(case, weighting, layered, seed):
    """NaN spoils the gradients of experts that see it, and no bit of the others'."""
    net, family, x = case
    torch.manual_seed(seed)
    y, group = torch.rand(len(x)).round(), seed % family.num_groups
    sees = family.membership[:, group]
    start = sum([*family.groups.values()][:group])
    spoilt = x.clone()
    spoilt[0, start : start + [*family.groups.values()][group]] = torch.nan
    found = []
    for inputs in (x, spoilt):
        net.zero_grad()
        loss = net.gem_loss(inputs, y, weighting=weighting)
        if layered:
            loss = mk.gem_loss(net.layers.layered(inputs), y, family, weighting=weighting)
        loss.backward()
        found.append([p.grad.clone() for p in net.parameters()])
    for k, layer in enumerate(net.layers):
        for offset, experts in enumerate(experts_of(layer, family)):
            before, after = (grads[2 * k + offset] for grads in found)
            spoilt = sees[experts]
            assert torch.equal(before[~spoilt], after[~spoilt])
            assert torch.equal(after.isnan(), spoilt)


# --- The loss ------------------------------------------------------------------------------------


@st.composite
def options_of_a_loss(draw):
    """For ``losses``."""
    return {
        "confidence": draw(st.sampled_from(CONFIDENCES)),
        "weighting": draw(st.sampled_from(WEIGHTINGS)),
        "normalize": draw(st.sampled_from(NORMALIZE)),
        "sharpness": draw(st.sampled_from([1.0, 0.7, 3.0])),
        "masked": draw(st.booleans()),
        "weighs": draw(st.booleans()),
        "wants_x": draw(st.booleans()),
        "seed": draw(seeds),
    }


def losses(case, definition, masked, weighs, wants_x, seed, **options):
    """Loss and gradients in one pass, layer by layer, in float64 by ``definition``; their noise.

    ``definition(net, x, parameters)`` are the logits. The noise is what the gradients would be had
    every sample's a random sign (the root of the mean square of four such): errors of rounding add
    up like that, and do not cancel where the samples do.
    """
    net, family, x = case
    torch.manual_seed(seed)
    y = torch.rand(len(x)).round()
    options["mask"] = torch.rand(len(x)) < 0.7 if masked else None
    times = torch.rand(len(x)) * torch.randint(3, (len(x),))
    options["sample_weight"] = times if weighs else None
    leaves = [t.detach().double().requires_grad_() for t in (x, *net.parameters())]
    logits = definition(net, leaves[0], leaves[1:])
    true = mk.gem_loss(logits, y, family, **options)
    (cotangent,) = torch.autograd.grad(true, logits, retain_graph=True)

    def gradients(g):
        return torch.autograd.grad(logits, leaves, g, True, materialize_grads=True)

    expected = [true.detach(), *gradients(cotangent)]
    drawn = [gradients(cotangent * torch.randn(len(x), 1).sign()) for _ in range(4)]
    squares = (torch.stack(of).square().mean(0) for of in zip(*drawn, strict=True))
    noise = [true.detach(), *(mean.sqrt() for mean in squares)]
    x.requires_grad_(wants_x)
    given_to = [x, *net.parameters()] if wants_x else [*net.parameters()]
    if not wants_x:
        del expected[1], noise[1]
    ours = net.gem_loss(x, y, **options)
    plain = mk.gem_loss(net.layers.layered(x), y, family, **options)
    found = [
        [loss.detach(), *torch.autograd.grad(loss, given_to, materialize_grads=True)]
        for loss in (ours, plain)
    ]
    with torch.no_grad():
        assert torch.equal(net.gem_loss(x, y, **options), ours)
    return *found, expected, noise


@given(mlps(DTYPES, max_experts=8), options_of_a_loss())
def test_equals_the_loss_of_its_logits(case, options):
    floor = 64 * torch.finfo(case[2].dtype).eps
    # Weights follow the logits' rounding: half-precision logits move the weights themselves.
    for a, b, t, n in zip(*losses(case, oracle, **options), strict=True):
        if t.numel():
            error, theirs = (a.double() - t).abs().max(), (b.double() - t).abs().max()
            most = max(t.abs().max(), n.abs().max())  # of the sum, and of what is added up
            assert error <= 2 * theirs + floor * most + 1e-30, (error, theirs, most)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("rows", [70, 5000])  # activations are kept for few rows only
def test_layers_that_route_between_experts_have_their_loss(rows, normalize):
    """Factors of experts, known at the end, are then no common factors of anything."""
    torch.manual_seed(0)
    net = mk.InterpretableMLP(CUBE, [64, 64], "tanh")
    layouts = [
        mk.BlockLayout(layout.row_sizes, layout.col_sizes, layout.present)
        for layout in net.layers.layouts
    ]
    net.layers = mk.MaskedMLP(layouts, "tanh")
    x, y = torch.randn(rows, 22), torch.rand(rows).round()
    plain = copy.deepcopy(net)
    plain.layers[0].register_forward_hook(lambda *args: None)
    assert net.layers.unsupported_reason() is None
    assert plain.layers.unsupported_reason() is not None
    expected = step(plain, x, y, normalize=normalize)
    for ours, theirs in zip(step(net, x, y, normalize=normalize), expected, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 8.0, 60.0])
def test_keeps_its_digits_where_tanh_saturates(confidence, scale):
    torch.manual_seed(0)
    family = mk.SubsetFamily.powerset({"a": 1, "b": 1})
    net = mk.InterpretableMLP(family, [], None)
    x, y = scale * torch.randn(64, 2), torch.rand(64).round()
    for sharpness in (1.0, 2.5):
        ours = step(net, x, y, confidence=confidence, sharpness=sharpness)
        other = copy.deepcopy(net).double()
        true = step(other, x.double(), y, confidence=confidence, sharpness=sharpness)
        for a, t in zip(ours, true, strict=True):
            torch.testing.assert_close(a.double(), t, rtol=2e-5, atol=1e-6 * float(t.abs().max()))


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_what_a_mask_leaves_out_reaches_nothing(normalize, backend):
    torch.manual_seed(0)
    net = mk.InterpretableMLP(CUBE, [16, 5], backend=backend)
    x, y, mask = torch.randn(300, 22), torch.rand(300).round(), torch.rand(300) < 0.5
    options = {"normalize": normalize, "mask": mask}
    expected = step(net, x, y, **options)
    for fill in (torch.nan, torch.inf, 1e38):
        spoilt = x.masked_fill(~mask[:, None], fill)
        found = step(net, spoilt, y.masked_fill(~mask, fill), **options)
        assert same_bits(expected, found)
        assert not found[1][~mask].any()


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("weighting", ["selection", "uniform"])
def test_samples_of_weight_zero_reach_nothing(weighting, backend):
    torch.manual_seed(0)
    net = mk.InterpretableMLP(CUBE, [16, 5], backend=backend)
    x, y, mask = torch.randn(300, 22), torch.rand(300).round(), torch.rand(300) < 0.8
    times = torch.rand(300) * torch.randint(3, (300,))
    out = (times == 0) | ~mask
    options = {"weighting": weighting, "mask": mask}
    expected = step(net, x, y, sample_weight=times, **options)
    for fill in (torch.nan, torch.inf, 1e38):
        spoilt, odd = x.masked_fill(out[:, None], fill), times.masked_fill(~mask, fill)
        found = step(net, spoilt, y.masked_fill(out, fill), sample_weight=odd, **options)
        assert same_bits(expected, found)
        assert not found[1][out].any()
    for bad in (-0.5, torch.nan, torch.inf):
        with pytest.raises(mk.LayoutError, match="sample_weight must hold finite numbers"):
            net.gem_loss(x, y, sample_weight=times.masked_fill(mask, bad), **options)


def test_with_no_sample_at_all():
    net = mk.InterpretableMLP(CUBE, [4])
    for options in ({}, {"normalize": "expert"}, {"normalize": "batch"}):
        for x, mask in ((torch.randn(0, 22), None), (torch.randn(5, 22), torch.zeros(5).bool())):
            loss, *grads = step(net, x, torch.zeros(len(x)), mask=mask, **options)
            assert loss == 0
            assert not any(grad.any() for grad in grads)


def test_gradients_scale_with_the_loss_and_may_be_asked_for_twice():
    torch.manual_seed(0)
    net = mk.InterpretableMLP(CUBE, [9])
    x, y = torch.randn(30, 22), torch.rand(30).round()
    loss = net.gem_loss(x, y)
    parameters = [*net.parameters()]
    once = torch.autograd.grad(loss, parameters, retain_graph=True)
    kept = [g.clone() for g in once]
    twice = torch.autograd.grad(-2.5 * loss, parameters)
    for a, b, c in zip(once, kept, twice, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, -2.5 * b)
    factors = torch.tensor([1.0, -2.5])
    batched = torch.autograd.grad(
        net.gem_loss(x, y), parameters, grad_outputs=factors, is_grads_batched=True
    )
    for a, b in zip(batched, kept, strict=True):
        torch.testing.assert_close(a, torch.stack([b, -2.5 * b]))
    net.gem_loss(x, y).backward()
    for p in parameters:  # given away: what comes later must not write into it
        p.grad.zero_()
    again = torch.autograd.grad(net.gem_loss(x, y), parameters)
    assert same_bits(again, kept)


def test_a_loss_that_went_backward_says_so_when_asked_again():
    net = mk.InterpretableMLP(CUBE, [9])
    x = torch.randn(30, 22)
    loss = net.gem_loss(x, torch.ones(30))
    loss.backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        loss.backward()
    held = weakref.ref(x)  # who keeps losses keeps no batches
    del x
    assert held() is None


def test_gradients_are_those_of_the_weights_that_the_loss_was_taken_with():
    torch.manual_seed(0)
    net = mk.InterpretableMLP(CUBE, [9])
    x, y = torch.randn(30, 22), torch.rand(30).round()
    parameters = [*net.parameters()]
    expected = torch.autograd.grad(net.gem_loss(x, y), parameters)
    loss = net.gem_loss(x, y)
    with torch.no_grad():
        for p in parameters:
            p.mul_(3)
    assert same_bits(torch.autograd.grad(loss, parameters), expected)


def test_frozen_parameters_have_no_gradient_and_the_others_keep_theirs():
    torch.manual_seed(0)
    net = mk.InterpretableMLP(CUBE, [9, 4])
    x, y = torch.randn(30, 22), torch.rand(30).round()
    expected = step(net, x, y)[2:]
    net.layers[1].weight.requires_grad_(False)
    net.layers[0].bias.requires_grad_(False)
    for loss in (net.gem_loss(x, y), mk.gem_loss(net(x), y, CUBE)):
        net.zero_grad()
        loss.backward()
        for p, grad in zip(net.parameters(), expected, strict=True):
            if p.requires_grad:
                torch.testing.assert_close(p.grad, grad)
            else:
                assert p.grad is None
    for p in net.parameters():
        p.requires_grad_(False)
    assert not net.gem_loss(x, y).requires_grad
    wanted = x.requires_grad_()
    (grad,) = torch.autograd.grad(net.gem_loss(wanted, y), wanted)
    torch.testing.assert_close(grad, step(net, x, y)[1])


def test_a_second_derivative_is_refused():
    net = mk.InterpretableMLP(CUBE, [9])
    x, y = torch.randn(6, 22, requires_grad=True), torch.rand(6).round()
    for value in (net.gem_loss(x, y), net(x).sum()):
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        with pytest.raises(mk.BackendError, match="twice"):
            (grad**2).sum().backward()


# --- Tables --------------------------------------------------------------------------------------

SIZES = NCFSizes(40, 30, {"sex": (2, 2), "age": (7, 6)}, 5, 8, 16)


def ncf(rows, seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    model = InterpretableNCF(SIZES, (20, 8), **options)
    for table in (model.inputs.user, model.inputs.item):
        torch.nn.init.normal_(table.weight)
    user, item = (torch.randint(n, (rows,)) for n in (40, 30))
    codes = torch.stack([torch.randint(n, (rows,)) for n in (2, 7)], -1)
    numeric = torch.randn(rows, 5, dtype=dtype)
    return model.to(dtype), (user, item, codes, numeric), torch.rand(rows).round()


def check_tables(model, data, y, **options):
    """Loss and all gradients are about as close to those in float64 as the layers' are."""
    options |= {"confidence": "rare", "weighting": "deselection"}
    dtype = data[3].dtype
    true = copy.deepcopy(model).double()
    plain = copy.deepcopy(model)
    plain.experts.layers[0].register_forward_hook(lambda *args: None)
    assert plain.experts.layers.unsupported_reason() is not None
    wide = (*data[:3], data[3].double())
    found = []
    for net, inputs in ((model, data), (plain, data), (true, wide)):
        loss = net.gem_loss(*inputs, y, **options)
        grads = torch.autograd.grad(loss, [*net.parameters()], materialize_grads=True)
        found.append([loss, *grads])
    assert model.experts.layers.unsupported_reason() is None
    floor = 64 * torch.finfo(dtype).eps
    for a, b, t in zip(*found, strict=True):
        error, theirs = (a.double() - t).abs().max(), (b.double() - t).abs().max()
        assert error <= 2 * theirs + floor * t.abs().max() + 1e-30


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("embeddings", ["shared", "strict"])
def test_embedding_rows_get_the_gradients_of_who_named_them(isa, normalize, embeddings):
    native.set_isa(isa)
    for rows, dtype in itertools.product((0, 1, 200), DTYPES):
        model, data, y = ncf(rows, embeddings=embeddings, dtype=dtype)
        check_tables(model, data, y, normalize=normalize)


@pytest.mark.parametrize("normalize", [None, "batch"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_samples_are_shared_out_some_tiles_at_a_time(normalize, threads):
    model, data, y = ncf(50_001)  # three times what is gathered before it is shared out
    torch.set_num_threads(threads)
    check_tables(model, data, y, normalize=normalize)


@pytest.mark.parametrize("rows", [1900, 2048, 2600, 4096])
def test_backward_cuts_the_batch_as_forward_did(rows):
    """However many threads there are by then."""
    net = mk.InterpretableMLP(mk.SubsetFamily.powerset({"a": 5, "b": 6}), [16])
    x, cotangent = torch.randn(rows, 11), torch.randn(rows, 3)
    parameters = [*net.parameters()]
    for first, then in itertools.product((1, 2, 4), repeat=2):
        torch.set_num_threads(first)
        logits, layered = net(x), net.layers.layered(x)
        torch.set_num_threads(then)
        found = torch.autograd.grad(logits, parameters, cotangent)
        expected = torch.autograd.grad(layered, parameters, cotangent)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_logits_of_ids_are_those_of_gathered_rows():
    model, data, _ = ncf(60)
    gathered = model.inputs(*data)
    parts = model.inputs.parts(*data)
    assert isinstance(parts, Inputs)
    assert torch.equal(parts.joined(), gathered)
    assert torch.equal(model.experts(parts), model.experts(gathered))
    cotangent = torch.randn(60, 4)
    pairs = [
        torch.autograd.grad(model.experts(x), [*model.parameters()], cotangent)
        for x in (parts, gathered)
    ]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_watched_embeddings_are_called():
    model, data, _ = ncf(6)
    seen = []
    model.inputs.user.register_forward_hook(lambda *args: seen.append(1))
    model(*data)
    assert seen


def test_ids_beyond_their_table_are_refused():
    model, (user, item, codes, numeric), y = ncf(6)
    for wrong in (40, -1):
        user[3] = wrong
        for call in (model, lambda *a: model.gem_loss(*a, y)):
            with pytest.raises((RuntimeError, IndexError), match=f"{wrong}"):
                call(user, item, codes, numeric)


def test_tables_alone_without_columns():
    torch.manual_seed(0)
    tables = [torch.randn(5, 3, requires_grad=True), torch.randn(9, 19, requires_grad=True)]
    ids = [torch.randint(5, (4, 6)), torch.randint(9, (4, 6))]
    net = mk.InterpretableMLP(CUBE, [8, 8], "gelu")
    last = torch.randn(4, 6, 0)
    inputs = Inputs(None, tables, ids, (0, 1))
    expected = net.layers.layered(torch.cat([tables[0][ids[0]], tables[1][ids[1]], last], -1))
    logits = net(inputs)
    torch.testing.assert_close(logits, expected)
    cotangent = torch.randn(4, 6, 7)
    for a, b in zip(
        torch.autograd.grad(logits, tables, cotangent),
        torch.autograd.grad(expected, tables, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


# --- Drop-in -------------------------------------------------------------------------------------


def test_flops_count_present_blocks():
    net = mk.InterpretableMLP(CUBE, [8, 3])
    weights = sum(layer.layout.num_weights for layer in net.layers)
    tables = [torch.randn(5, 3), torch.randn(9, 19)]
    ids = [torch.randint(len(table), (4, 6)) for table in tables]
    for inputs in (torch.randn(4, 6, CUBE.in_features), Inputs(None, tables, ids, (0, 1))):
        call = net.layers.fused(inputs)
        with FlopCounterMode(display=False) as counter:  # its hooks would part a module's layers
            masked_mlp(call)
        assert counter.get_total_flops() == 2 * 24 * weights


def test_which_path_runs_and_why():
    net = mk.InterpretableMLP(CUBE, [4])
    assert "one op" in repr(net)
    for change, reason in (
        (lambda n: n.double(), "float64"),
        (lambda n: n.layers[0].register_forward_pre_hook(lambda *a: None), "hook"),
        (lambda n: n.layers.__setitem__(0, torch.nn.Linear(22, 28)), "Linear"),
        (lambda n: setattr(n.layers[0], "backend", "torch"), "torch"),
    ):
        other = copy.deepcopy(net)
        change(other)
        assert reason in other.layers.unsupported_reason()
        assert f"layer by layer: {other.layers.unsupported_reason()}" in repr(other)
        x = torch.randn(3, 22, dtype=next(other.parameters()).dtype)
        torch.testing.assert_close(other(x), other.layers.layered(x))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_tensors_in_place_of_parameters_run_as_one_op(name):
    """Wrappers that keep all parameters in one flat tensor put views of it where those were."""
    net = mk.InterpretableMLP(CUBE, [4])
    x, y = torch.randn(3, 22), torch.tensor([0.0, 1.0, 1.0])
    expected = torch.autograd.grad(net.gem_loss(x, y), [*net.parameters()])
    flat = torch.cat([p.detach().reshape(-1) for p in net.parameters()]).requires_grad_()
    views = iter(flat.split([p.numel() for p in net.parameters()]))
    for layer in net.layers:
        for key, view in zip(("weight", "bias"), views, strict=False):
            if key == name:
                delattr(layer, key)
                setattr(layer, key, view)
    assert net.layers.unsupported_reason() is None
    of_flat, *of_others = torch.autograd.grad(net.gem_loss(x, y), [flat, *net.parameters()])
    ours = iter(of_flat.split([g.numel() for g in expected]))
    others = iter(of_others)
    for k, grad in enumerate(expected):
        mine = next(ours)
        replaced = ("weight", "bias")[k % 2] == name
        assert torch.equal(mine if replaced else next(others), grad)


def test_some_of_its_layers_are_a_plain_sequence():
    net = mk.InterpretableMLP(CUBE, [4, 5])
    x = torch.randn(3, 22)
    part = net.layers[:2]
    assert type(part) is torch.nn.Sequential
    assert torch.equal(net.layers[2](part(x)), net.layers.layered(x))
    net.layers.append(torch.nn.Identity())
    assert "3 layers and has 4" in net.layers.unsupported_reason()
    assert torch.equal(net(x), net.layers.layered(x))


def test_any_masks_one_after_the_other():
    """Masks that share no blocks run layer by layer, and say so; with the same blocks, as one."""
    torch.manual_seed(0)
    degrees = [torch.arange(6), torch.arange(20) % 5, torch.arange(6)]
    masks = [b[:, None] >= a for a, b in itertools.pairwise(degrees)]
    layouts = [mk.BlockLayout.from_mask(mask) for mask in masks]
    made = mk.MaskedMLP(layouts, "tanh")
    x = torch.randn(7, 6)
    torch.testing.assert_close(made(x), made.layered(x))
    apart = mk.MaskedMLP([layouts[0], mk.BlockLayout.from_mask(torch.rand(3, 20) < 0.5)])
    assert "not cut into the blocks" in apart.unsupported_reason()
    assert torch.equal(apart(x), apart.layered(x))
    with pytest.raises(mk.LayoutError, match=r"layouts\[0\] has 20 units, layouts\[1\] reads 6"):
        mk.MaskedMLP([layouts[0], layouts[0]])
    with pytest.raises(mk.LayoutError, match="at least one layout"):
        mk.MaskedMLP([])


def test_autocast_computes_in_its_dtype():
    torch.manual_seed(0)
    net = mk.InterpretableMLP(CUBE, [16])
    x, y = torch.randn(40, 22), torch.rand(40).round()
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = net(x), net.gem_loss(x, y)
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    other = copy.deepcopy(net).bfloat16()
    assert torch.equal(logits, other(x.bfloat16()))
    loss.backward()
    other.gem_loss(x.bfloat16(), y).backward()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad.float())


def test_autocast_takes_no_integers():
    """As ``masked_linear``: only floating-point tensors are cast."""
    net = mk.InterpretableMLP(CUBE, [16])
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(mk.LayoutError, match="int64"):
        net(torch.ones(4, 22, dtype=torch.int64))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole_with_loss_and_tables(backend):
    torch._dynamo.reset()
    model, data, y = ncf(12, seed=3)
    options = {"confidence": "rare", "weighting": "deselection", "normalize": "expert"}

    def loss(user, item, codes, numeric, target):
        return model.gem_loss(user, item, codes, numeric, target, **options)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    parameters = [*model.parameters()]
    for rows in (12, 30, 7):
        _, data, y = ncf(rows, seed=rows)
        with torch.compiler.set_stance("default" if rows == 12 else "fail_on_recompile"):
            ours = compiled(*data, y)
            got = torch.autograd.grad(ours, parameters)
        theirs = loss(*data, y)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(got, torch.autograd.grad(theirs, parameters))


def op_arguments():
    """What the ops take of an MLP with a table: inputs and parameters, plans, ids."""
    torch.manual_seed(0)
    net = mk.InterpretableMLP(CUBE, [5, 6])
    plans = [serialized_layout(layer.layout, torch.device("cpu")) for layer in net.layers]
    numbers = [layer.layout.id for layer in net.layers]
    parameters = [
        [p.detach() for p in of]
        for of in zip(*((layer.weight, layer.bias) for layer in net.layers), strict=True)
    ]
    table, ids, x = torch.randn(6, 3), torch.randint(6, (4,)), torch.randn(4, 19)
    return (x, [table], [ids], [0, -19], *parameters), plans, numbers


def test_opcheck():
    inputs, plans, numbers = op_arguments()
    ops = torch.ops.maskmoe
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        ops.masked_mlp, (*inputs, plans, numbers, 7, "relu", False), test_utils=checks
    )
    needs = (True, True, True)
    torch.library.opcheck(
        ops.masked_mlp_backward,
        (torch.randn(4, 7), *inputs, torch.empty(0, 0), plans, numbers, "relu", *needs),
        test_utils=checks,
    )
    torch.library.opcheck(
        ops.masked_mlp_gem,
        (
            *inputs, plans, numbers, "relu", torch.rand(4).round(), None, torch.rand(4),
            CUBE.strict, "abs", 1.0, "selection", "none", *needs,
        ),
        test_utils=checks,
    )  # fmt: skip
    torch.library.opcheck(
        ops.masked_mlp_mixture,
        (*inputs, plans, numbers, "relu", CUBE.strict, "abs", 1.0),
        test_utils=checks,
    )


def test_without_kernels_it_runs_layer_after_layer():
    """What an exported program does where the extension is not to be had."""
    inputs, plans, numbers = op_arguments()
    grad = torch.randn(4, 7)
    found = []
    for name in ("masked_mlp", "torch_mlp"):
        forward = getattr(torch.ops.maskmoe, name)
        backward = getattr(torch.ops.maskmoe, name + "_backward")
        logits, saved = forward(*inputs, plans, numbers, 7, "gelu", True)
        grads = backward(grad, *inputs, saved, plans, numbers, "gelu", True, True, True)
        found.append([logits, *grads])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_in_float64_the_op_refuses_and_layer_after_layer_runs():
    inputs, plans, numbers = op_arguments()
    x, tables, ids, parts, weights, biases = inputs
    double = [
        x.double(), [t.double() for t in tables], ids, parts, [w.double() for w in weights],
        [b.double() for b in biases],
    ]  # fmt: skip
    ops, rest = torch.ops.maskmoe, (plans, numbers, 7, "gelu", True)
    with pytest.raises(RuntimeError, match=r"masked_mlp: weights\[0\] is Double; .*='torch'"):
        ops.masked_mlp(*double, *rest)
    expected = ops.masked_mlp(*inputs, *rest)[0]
    torch.testing.assert_close(ops.torch_mlp(*double, *rest)[0].float(), expected)


@pytest.mark.slow
def test_an_exported_program_runs_without_the_extension(tmp_path):
    torch.manual_seed(0)
    model, data, _ = ncf(4)
    rows = torch.export.Dim("rows")
    program = torch.export.export(model, data, dynamic_shapes=({0: rows},) * 4)
    torch.export.save(program, tmp_path / "net.pt2")
    _, data, _ = ncf(9, seed=4)
    torch.save((data, model(*data).detach()), tmp_path / "data.pt")
    code = (
        "import sys, torch, maskmoe_kernels as mk\n"
        "assert mk.info()['backends']['native']['unsupported_reason']\n"
        "net = torch.export.load(sys.argv[1] + '/net.pt2').module()\n"
        "data, expected = torch.load(sys.argv[1] + '/data.pt')\n"
        "torch.testing.assert_close(net(*data), expected)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin", "MASKMOE_EXTENSION": str(tmp_path / "none.so")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_errors_carry_the_values():
    net = mk.InterpretableMLP(CUBE, [4])
    x, y = torch.randn(3, 22), torch.zeros(3)
    with pytest.raises(mk.LayoutError, match=r"in_features=22, got \(3, 21\)"):
        net(x[:, 1:])
    with pytest.raises(mk.LayoutError, match=r"target .* \(3,\), got \(2,\)"):
        net.gem_loss(x, y[1:])
    with pytest.raises(mk.LayoutError, match="'relu'"):
        net.gem_loss(x, y, confidence="relu")
    with pytest.raises(mk.LayoutError, match=r"bfloat16.*float32"):
        net(x.bfloat16())
    table, ids = torch.randn(5, 3), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(mk.LayoutError, match=r"22 columns in all, got 18 of an x with 18"):
        net(Inputs(x[:, :18], [table], [ids], (0, -18)))
    for order in ((0, 0, -16), (1, -19), (-19,)):
        with pytest.raises(mk.LayoutError, match=r"name each of 1 tables once.*and 1 ids"):
            net(Inputs(x[:, :19], [table], [ids], order))
    with pytest.raises(mk.LayoutError, match=r"name each of 0 tables once.*and 1 ids"):
        net(Inputs(x, [], [ids], (-22,)))
    with pytest.raises(mk.LayoutError, match=r"ids\[0\] must be \(3,\) int64"):
        net(Inputs(x[:, :19], [table], [ids[:2]], (0, -19)))
    with pytest.raises(mk.LayoutError, match=r"ids\[0\] must be \(3,\) int64.*int32"):
        net(Inputs(x[:, :19], [table], [ids.int()], (0, -19)))


def test_what_kernels_refuse_is_a_backend_error():
    def refuse(text):
        raise RuntimeError(text)

    with pytest.raises(mk.BackendError, match=r"^the fused mlp needs 9 bytes.*backend=None"):
        run(refuse, "gem, x.cu:1, maskmoe: the fused mlp needs 9 bytes\nstack")
    with pytest.raises(RuntimeError, match="something else"):
        run(refuse, "something else")


def test_a_callable_confidence_takes_the_layers():
    net = mk.InterpretableMLP(CUBE, [4])
    x, y = torch.randn(9, 22), torch.rand(9).round()
    found = net.gem_loss(x, y, confidence=lambda z: torch.tanh(z).abs())
    torch.testing.assert_close(found, net.gem_loss(x, y))


def test_a_soft_target_that_wants_a_gradient_gets_it():
    net = mk.InterpretableMLP(CUBE, [4])
    y = torch.rand(9, requires_grad=True)
    (grad,) = torch.autograd.grad(net.gem_loss(torch.randn(9, 22), y), y)
    assert grad.any()


def test_trains_like_the_layers_do():
    torch.manual_seed(0)
    nets = [mk.InterpretableMLP(CUBE, [16, 16])]
    nets.append(copy.deepcopy(nets[0]))
    x = torch.randn(256, 22)
    y = (x[:, 3] > 0).float()
    for net in nets:
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            if net is nets[0]:
                loss = net.gem_loss(x, y, weighting="deselection")
            else:
                loss = mk.gem_loss(net.layers.layered(x), y, CUBE, weighting="deselection")
            loss.backward()
            optimizer.step()
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    found = F.binary_cross_entropy_with_logits(2 * nets[0](x)[:, -1], y)
    assert found < 0.3


# --- Prediction ----------------------------------------------------------------------------------


@given(
    mlps(DTYPES, max_experts=8),
    st.sampled_from(CONFIDENCES),
    st.sampled_from([1.0, 0.7, 3.0]),
)
def test_predicts_what_the_mixture_of_its_logits_is(case, confidence, sharpness):
    net, family, x = case
    ours = net.predict(x, confidence, sharpness)
    with torch.no_grad():
        logits = copy.deepcopy(net).float()(x.float())
        theirs = mk.mixture(logits, family, confidence, sharpness)
    # Those that multiply bfloat16 round activations between layers: see test_mlp_bfloat16.py.
    rounded = x.dtype == torch.bfloat16 and native.isa().startswith(OF_BFLOAT16)
    tolerance = {"rtol": 0, "atol": 0.1} if rounded else {"rtol": 1e-4, "atol": LEAST[confidence]}
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, **tolerance)


def test_predictions_where_nobody_or_everybody_is_sure():
    family = mk.SubsetFamily.powerset({"a": 1, "b": 1})
    net = mk.InterpretableMLP(family, [], None)
    x = torch.tensor([[0.0, 0.0], [1e4, 1e4], [-1e4, 3e-8], [torch.nan, 2.0], [torch.inf, 0.0]])
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(0 if p is net.layers[0].bias else 1)
    for sharpness in (1.0, 2.0):
        ours = net.predict(x, "square", sharpness)
        theirs = mk.mixture(net.layers.layered(x).detach(), family, "square", sharpness)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-30, equal_nan=True)
    assert torch.equal(ours.attribution[0], torch.full((3,), 1 / 3))


def test_predictions_by_ids_keep_the_leading_shape():
    model, data, _ = ncf(24)
    shaped = [t.reshape(4, 6, *t.shape[1:]) for t in data]
    ours = model.experts.predict(model.inputs.parts(*shaped), "rare")
    theirs = mk.mixture(model(*data).detach(), model.family, "rare")
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-5, atol=1e-7)
    assert not ours.probability.requires_grad
