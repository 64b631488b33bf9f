"""zuko's masked networks rebuilt on ``MaskedLinear`` from their own masks: the same function."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from maskmoe_kernels import MaskedLinear

zuko = pytest.importorskip("zuko", reason="zuko is not installed")

seeds = st.integers(0, 2**31 - 1)


def rebuild(module):
    """A copy of ``module`` in which each of zuko's masked layers is ours."""
    if isinstance(module, zuko.nn.MaskedLinear):
        return MaskedLinear.from_linear(module, module.mask)
    if isinstance(module, nn.Sequential):
        parts = [rebuild(part) for part in module]
        residual = isinstance(module, zuko.nn.Residual)
        return zuko.nn.Residual(*parts) if residual else nn.Sequential(*parts)
    return module  # an activation, without parameters


def masked_layers(net, kind):
    return [layer for layer in net.modules() if isinstance(layer, kind)]


def assert_same_function(net, shape, seed=0):
    """Equal outputs and equal gradients of the input and of every visible parameter."""
    generator = torch.Generator().manual_seed(seed)
    net = net.double()
    ours = rebuild(net)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
    y, z = net(x), ours(x)
    torch.testing.assert_close(z, y)
    grad_y = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    theirs = masked_layers(net, zuko.nn.MaskedLinear)
    mine = masked_layers(ours, MaskedLinear)
    assert len(theirs) == len(mine) > 0
    grad_x, *expected = torch.autograd.grad(
        y, [x, *(p for layer in theirs for p in (layer.weight, layer.bias))], grad_y
    )
    grad_z, *actual = torch.autograd.grad(
        z, [x, *(p for layer in mine for p in (layer.weight, layer.bias))], grad_y
    )
    torch.testing.assert_close(grad_z, grad_x)
    for k, (layer, dense) in enumerate(zip(mine, theirs, strict=True)):
        assert torch.equal(layer.layout.mask(), dense.mask)
        assert layer.weight.numel() == int(dense.mask.sum())  # no invisible weight is stored
        torch.testing.assert_close(actual[2 * k], layer.layout.pack(expected[2 * k]))
        torch.testing.assert_close(actual[2 * k + 1], expected[2 * k + 1])


def autoregressive(features, outputs_each=1, seed=None):
    """Adjacency of MADE: output k sees the features before k, in a possibly shuffled order."""
    order = torch.arange(features)
    if seed is not None:
        order = torch.randperm(features, generator=torch.Generator().manual_seed(seed))
    return (order[:, None] > order).repeat_interleave(outputs_each, dim=0)


ADJACENCIES = {
    "readme": torch.tensor([[0, 1, 1], [0, 1, 1], [0, 0, 1], [1, 1, 0]], dtype=torch.bool),
    "autoregressive": autoregressive(6),
    "autoregressive shuffled": autoregressive(8, outputs_each=3, seed=1),
    "coupling": torch.tensor([[0, 0, 0, 0]] * 2 + [[1, 1, 0, 0]] * 2, dtype=torch.bool),
    "dense": torch.ones(3, 5, dtype=torch.bool),
    "diagonal": torch.eye(5, dtype=torch.bool),
    "one feature unseen": torch.tensor([[1, 0, 0], [1, 1, 0]], dtype=torch.bool),
}


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ELU, nn.Tanh])
@pytest.mark.parametrize("hidden", [(), (16,), (33, 20, 33)], ids=str)
@pytest.mark.parametrize("name", ADJACENCIES)
def test_masked_mlp(name, hidden, activation):
    torch.manual_seed(0)
    adjacency = ADJACENCIES[name]
    net = zuko.nn.MaskedMLP(adjacency, hidden, activation=activation)
    assert_same_function(net, (5, adjacency.shape[1]))


@pytest.mark.parametrize("name", ["readme", "autoregressive shuffled"])
def test_residual_masked_mlp(name):
    torch.manual_seed(0)
    adjacency = ADJACENCIES[name]
    net = zuko.nn.MaskedMLP(adjacency, (16, 16), residual=True)
    assert_same_function(net, (2, 3, adjacency.shape[1]))


def test_units_of_an_autoregressive_network_are_interleaved():
    net = zuko.nn.MaskedMLP(ADJACENCIES["autoregressive"], (64, 64))
    layout = masked_layers(rebuild(net), MaskedLinear)[1].layout
    assert layout.row_order is not None  # equal units lie apart in zuko's masks
    assert len(layout.row_sizes) <= 6
    assert 0 < layout.density < 1


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 20), seeds)
def test_random_adjacency(outputs, features, width, seed):
    torch.manual_seed(seed)
    adjacency = torch.rand(outputs, features) < 0.5
    assume(adjacency.any())
    net = zuko.nn.MaskedMLP(adjacency, (width, width + 1), activation=nn.ELU)
    assert_same_function(net, (3, features), seed)


def test_autoregressive_flow_keeps_its_density():
    torch.manual_seed(0)
    flow = zuko.flows.MAF(features=5, context=2, transforms=3, hidden_features=(16, 16)).double()
    x, context = torch.randn(7, 5).double().requires_grad_(), torch.randn(7, 2).double()
    weights = torch.randn(7).double()
    expected = flow(context).log_prob(x)
    expected_grad = torch.autograd.grad(expected, x, weights)[0]
    replaced = 0
    for module in flow.modules():
        for name, child in module.named_children():
            if isinstance(child, zuko.nn.MaskedMLP):
                setattr(module, name, rebuild(child))
                replaced += 1
    assert replaced == 3
    actual = flow(context).log_prob(x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, x, weights)[0], expected_grad)


def test_jacobian_is_null_where_the_adjacency_is():
    torch.manual_seed(0)
    adjacency = ADJACENCIES["autoregressive shuffled"]
    ours = rebuild(zuko.nn.MaskedMLP(adjacency, (24, 24), activation=nn.ELU))
    jacobian = torch.autograd.functional.jacobian(ours, torch.randn(adjacency.shape[1]))
    assert not jacobian[~adjacency].any()
    assert jacobian[adjacency].ne(0).float().mean() > 0.9
