"""The definition in float64 is the layers' oracle, one after the other; the ops are held to it."""

import pytest
import torch

import maskmoe_kernels as mk
from maskmoe_kernels.ops.masked_mlp import reference
from maskmoe_kernels.testing import dense_oracle

FAMILY = mk.SubsetFamily.powerset({"a": 3, "b": 2, "c": 4})


@pytest.fixture(params=["biases", "no biases"])
def mlp(request):
    """An MLP, its input in parts, and what the definition takes of its layers."""
    torch.manual_seed(0)
    net = mk.InterpretableMLP(FAMILY, [5, 6], "tanh")
    if request.param == "no biases":
        net.layers = mk.MaskedMLP(net.layers.layouts, "tanh", bias=False)
    tables = [torch.randn(7, 3, requires_grad=True), torch.randn(8, 4, requires_grad=True)]
    ids = [torch.randint(7, (9,)), torch.randint(8, (9,))]
    inputs = mk.Inputs(torch.randn(9, 2, requires_grad=True), tables, ids, (0, -2, 1))
    weights = [layer.weight for layer in net.layers]
    biases = [layer.bias for layer in net.layers if layer.bias is not None]
    return net, inputs, (weights, biases, net.layers.layouts, "tanh")


def leaves(net, inputs):
    return [inputs.x, *inputs.tables, *net.parameters()]


def compare(ours, true, of):
    torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=1e-5)
    cotangent = torch.randn_like(true)
    for a, b in zip(
        torch.autograd.grad(ours, of, cotangent.to(ours.dtype)),
        torch.autograd.grad(true, of, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_logits(mlp):
    net, inputs, layers = mlp
    h = inputs.joined().double()
    for layer in net.layers:
        h = dense_oracle(h, layer.weight, layer.bias, layer.layout, layer.activation)
    true = reference.masked_mlp(inputs, *layers)
    assert true.dtype == torch.float64
    torch.testing.assert_close(true, h, rtol=1e-12, atol=1e-14)
    compare(net(inputs), true, leaves(net, inputs))


@pytest.mark.parametrize("weighting", ["selection", "deselection"])
@pytest.mark.parametrize("normalize", [None, "sample", "expert", "batch"])
def test_gem_loss(mlp, weighting, normalize):
    net, inputs, layers = mlp
    y, mask = (torch.arange(9) % 2).float(), torch.arange(9) != 4
    options = {"weighting": weighting, "normalize": normalize, "mask": mask, "sharpness": 1.5}
    ours = net.gem_loss(inputs, y, "smooth", **options)
    true = reference.masked_mlp_gem(inputs, *layers, y, FAMILY, "smooth", **options)
    compare(ours, true, leaves(net, inputs))


def test_mixture(mlp):
    net, inputs, layers = mlp
    ours = net.predict(inputs, "square", 0.7)
    true = reference.masked_mlp_mixture(inputs, *layers, FAMILY, "square", 0.7)
    for a, b in zip(ours, true, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)
    assert not true[0].requires_grad
