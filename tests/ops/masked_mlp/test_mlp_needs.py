"""Gradients that nobody needs are not computed: what a masked MLP asks for, what its ops return."""

import itertools

import pytest
import torch

import maskmoe_kernels as mk
from maskmoe_kernels.layout.chain import LayoutChain
from maskmoe_kernels.ops import native
from maskmoe_kernels.ops.masked_mlp import autograd, torch_impl
from maskmoe_kernels.ops.masked_mlp.call import Inputs, MLPCall

EVERY = [*itertools.product([False, True], repeat=3)]
FAMILY = mk.SubsetFamily.powerset({"a": 3, "b": 2, "c": 4})

fused = pytest.mark.skipif(
    native.UNSUPPORTED_REASON is not None, reason=f"{native.UNSUPPORTED_REASON}"
)


def an_mlp():
    """An MLP, its parts with two tables, and all tensors that may have a gradient."""
    torch.manual_seed(0)
    net = mk.InterpretableMLP(FAMILY, [5, 6], "tanh")
    tables = [torch.randn(7, 3), torch.randn(8, 4)]
    ids = [torch.randint(7, (9,)), torch.randint(8, (9,))]
    x = torch.randn(9, 2)
    return net, Inputs(x, tables, ids, (0, -2, 1))


def parts_of(net, parts):
    """x, the tables, the weights and biases."""
    return [parts.x], [*parts.tables], [*net.parameters()]


WAYS = {
    "logits": lambda net, parts, y: mk.gem_loss(net(parts), y, FAMILY),
    "loss": lambda net, parts, y: net.gem_loss(parts, y),
}


# Of group k (x, tables, parameters), the n-th tensor: does it want a gradient?
WANTED = {
    **{needs: lambda k, n, needs=needs: needs[k] for needs in EVERY},
    "no bias": lambda k, n: k < 2 or n % 2 == 0,
    "no weight": lambda k, n: k < 2 or n % 2 == 1,
    "not the first table": lambda k, n: (k, n) != (1, 0),
    "one bias": lambda k, n: (k, n) == (2, 3),
}


@fused
@pytest.mark.parametrize("way", WAYS)
def test_an_mlp_asks_for_the_gradients_that_it_needs(way, monkeypatch):
    calls, real = [], autograd.run

    def spy(op, *args):
        calls.append((op, args))
        return real(op, *args)

    monkeypatch.setattr(autograd, "run", spy)
    net, parts = an_mlp()
    y = torch.arange(9) % 2
    groups = parts_of(net, parts)
    every = [t for group in groups for t in group]
    for t in every:
        t.requires_grad_(True)
    whole = torch.autograd.grad(WAYS[way](net, parts, y.float()), every)
    for kind, wanted in WANTED.items():
        flags = [[wanted(k, n) for n in range(len(group))] for k, group in enumerate(groups)]
        for t, need in zip(every, itertools.chain(*flags), strict=True):
            t.requires_grad_(need)
            t.grad = None
        del calls[:]
        loss = WAYS[way](net, parts, y.float())
        if not any(map(any, flags)):
            assert not loss.requires_grad
            continue
        loss.backward()
        op, args = calls[-1]
        assert op is (autograd.GEM if way == "loss" else autograd.BACKWARD)
        assert args[-3:] == tuple(map(any, flags)), kind
        for t, need, expected in zip(every, itertools.chain(*flags), whole, strict=True):
            assert torch.equal(t.grad, expected) if need else t.grad is None


@fused
@pytest.mark.parametrize("needs", EVERY)
def test_the_ops_return_what_is_asked_for(needs):
    net, parts = an_mlp()
    call = net.requires_grad_(False).layers.fused(parts)
    groups = ([call.x], call.tables, [*call.weights, *call.biases])
    shapes = [t.shape for group, need in zip(groups, needs, strict=True) if need for t in group]
    for name in ("masked_mlp", "torch_mlp"):
        forward, backward = (getattr(torch.ops.maskmoe, name + end) for end in ("", "_backward"))
        logits, saved = forward(*call, True)
        grads = backward(torch.ones_like(logits), *call[:6], saved, *call[6:8], "tanh", *needs)
        assert [g.shape for g in grads] == shapes


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
def test_layer_after_layer_computes_no_gradient_for_nothing(biases, monkeypatch):
    op = "torch_linear" if native.UNSUPPORTED_REASON else "masked_linear"
    calls, real = [], torch_impl.BACKWARD[op]

    def spy(*args):
        calls.append(args)
        return real(*args)

    monkeypatch.setitem(torch_impl.BACKWARD, op, spy)
    net, parts = an_mlp()
    call = MLPCall.of(
        parts,
        [layer.weight.detach() for layer in net.layers],
        [layer.bias.detach() for layer in net.layers if biases],
        LayoutChain(net.layers.layouts),
        "tanh",
    )
    for needs in EVERY:
        del calls[:]
        torch.ops.maskmoe.torch_mlp_backward(
            torch.ones(9, 7), *call[:6], torch.empty(0, 0), *call[6:8], "tanh", *needs
        )
        asked = [call[-3:] for call in calls]  # from the last layer to the first
        first = needs[0] or needs[1]
        of_bias = needs[2] and biases
        assert asked == [(k > 0 or first, needs[2], of_bias) for k in (2, 1, 0)]
