"""Gradients that nobody needs are not computed: what the front ends ask for, what ops return."""

import itertools

import pytest
import torch

import maskmoe_kernels as mk
from maskmoe_kernels.layout.serialized import serialized_layout
from maskmoe_kernels.ops.masked_linear import schema as registration
from maskmoe_kernels.ops.masked_linear import torch_impl
from maskmoe_kernels.ops.masked_linear.api import OP_OF
from tests.ops.masked_linear.test_masked_linear import LAYOUTS, drawn, masked_linear, same_bits
from tests.ops.runners import DEVICE, INTERPRETED, QUICK, select

EVERY = [*itertools.product([False, True], repeat=3)]
SOME = [needs for needs in EVERY if any(needs)]
BACKENDS = sorted({runner.partition(" ")[0] for runner in QUICK} - {"reference"})


def op_of(backend):
    return "triton_linear" if backend in INTERPRETED else OP_OF[backend]


def spied(monkeypatch, functions, name):
    """Arguments of every call of ``functions[name]``."""
    calls, real = [], functions[name]

    def spy(*args):
        calls.append(args)
        return real(*args)

    monkeypatch.setitem(functions, name, spy)
    return calls


def flat(arguments):
    """What is needed comes as three arguments, or as a tuple of three."""
    *others, last = arguments
    return (*others, *last) if isinstance(last, tuple) else arguments


def on(runners, names):
    """(name of a layout, runner), with the smallest layout for the interpreter."""
    pairs = [(name, runner) for name in names for runner in runners]
    pairs += [("nothing", runner) for runner in INTERPRETED]
    return pytest.mark.parametrize(("name", "runner"), pairs, ids=[" ".join(p) for p in pairs])


@on(BACKENDS, ["hidden", "random"])
def test_a_layer_asks_for_the_gradients_that_it_needs(name, runner, monkeypatch):
    calls = spied(monkeypatch, registration.BACKWARD, op_of(runner))
    if runner == "triton":  # which is called without its op
        calls = spied(monkeypatch, vars(registration.triton_kernels()), "gradients")
    layout = LAYOUTS[name]
    layout.caches.dispatch.clear()  # which keeps what an earlier call looked up
    for needs in SOME:
        x, weight, bias = drawn(layout, (2,), torch.float32)
        inputs = [t.requires_grad_(need) for t, need in zip((x, weight, bias), needs, strict=True)]
        y = mk.masked_linear(*inputs, layout, "relu", runner)
        y.backward(torch.ones_like(y))
        assert flat(calls.pop())[-3:] == needs
        assert [t.grad is not None for t in inputs] == [*needs]
    x, weight, _ = drawn(layout, (2,), torch.float32)
    y = mk.masked_linear(x, weight.requires_grad_(), None, layout, None, runner)
    y.backward(torch.ones_like(y))
    assert flat(calls.pop())[-3:] == (False, True, False)
    with torch.no_grad():
        mk.masked_linear(x, weight, None, layout, None, runner)
    assert not calls
    layout.caches.dispatch.clear()


@on([runner for runner in QUICK if runner != "reference"], ["hidden", "random", "nothing"])
def test_an_op_returns_the_gradients_that_are_asked_for(name, runner):
    """Empty tensors in place of the others, and not a bit of difference to those that are."""
    layout = LAYOUTS[name]
    x, weight, bias = drawn(layout, (5,), torch.float32)
    op = op_of(select(runner))
    plan = serialized_layout(layout, DEVICE)
    forward = registration.FORWARD[op]
    y, z = forward(x, weight, bias, plan, layout.id, layout.out_features, "gelu", True)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    call = (grad, x, weight, z, plan, layout.id, "gelu")
    every = registration.BACKWARD[op](*call, True, True, True)
    assert [g.numel() for g in every] == [x.numel(), weight.numel(), bias.numel()]
    for needs in EVERY:
        for k, found in enumerate(registration.BACKWARD[op](*call, *needs)):
            whole, need = every[k], needs[k]
            without_weight = k == 2 and not needs[1]
            if not need:
                assert found.numel() == 0
            elif runner in INTERPRETED or (runner == "triton" and without_weight):
                # a bias without the weights is a sum of PyTorch's
                torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
            else:
                assert same_bits(found, whole)


def test_no_product_is_computed_for_nothing(monkeypatch):
    products = []
    for name in ("_multiply", "_grad_weight"):
        real = getattr(torch_impl, name)
        monkeypatch.setattr(
            torch_impl,
            name,
            lambda *args, name=name, real=real: products.append(name) or real(*args),
        )
    for needs in EVERY:
        x, weight, bias = drawn(LAYOUTS["hidden"], (2,), torch.float32)
        y, _ = torch_impl.forward(x, weight, bias, LAYOUTS["hidden"], "relu", True)
        del products[:]
        torch_impl.backward(y, x, weight, y, LAYOUTS["hidden"], "relu", needs)
        assert products == ["_multiply"] * needs[0] + ["_grad_weight"] * needs[1]


def test_flops_of_a_backward_are_those_of_what_it_needs():
    layout = LAYOUTS["hidden"]
    shapes = ((6, layout.out_features), (6, layout.in_features), (layout.num_weights,))
    given = [torch.empty(shape, device="meta") for shape in shapes]
    plan = serialized_layout(layout, torch.device("cpu"))
    assert layout.num_routed_weights < layout.num_weights
    for x, w, b in EVERY:
        flops = registration._backward_flops(*given, None, plan, layout.id, "relu", x, w, b)
        assert flops == 12 * (x * layout.num_routed_weights + w * layout.num_weights)


# --- The sign of a zero ------------------------------------------------------------------


@on([runner for runner in QUICK if runner != "reference"], ["random", "hidden", "nothing"])
def test_a_bias_of_minus_zero_tells_of_nothing_unseen(name, runner):
    """Where all a unit sees is nothing, or times 0, only the bias has a sign to give."""
    layout = LAYOUTS[name]
    x, weight, _ = drawn(layout, (2,), torch.float32)
    bias = torch.full((layout.out_features,), -0.0, device=DEVICE)
    for w in (weight, torch.zeros_like(weight)):
        mk.testing.assert_blind(
            lambda x, w=w: masked_linear(x, w, bias, layout, None, runner), x.abs(), layout.mask()
        )


@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (5, 3)])
@pytest.mark.parametrize("runner", [*QUICK, *INTERPRETED])
def test_a_zero_has_the_sign_that_the_seen_gives_it(runner, shape):
    """One weight of 0, in layouts so small that a product may add up from its first term."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[0, -1] = True
    layout = mk.BlockLayout.from_mask(mask)
    x, weight = torch.ones(2, shape[1], device=DEVICE), torch.zeros(1, device=DEVICE)
    x[:, -1] = -1
    for bias in (None, torch.full((shape[0],), -0.0, device=DEVICE)):
        mk.testing.assert_blind(
            lambda x, bias=bias: masked_linear(x, weight, bias, layout, None, runner),
            x, layout.mask(),
        )  # fmt: skip
