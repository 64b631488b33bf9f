"""FSDP2: its hooks are called, and what it never saw is refused in words."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import maskmoe_kernels as mk

FAMILY = mk.SubsetFamily.powerset({"a": 3, "b": 4})


class Model(nn.Module):
    """An MLP inside of what is sharded."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def loss(self, x, y):
        return self.net.gem_loss(x, y)


def mlp():
    torch.manual_seed(0)
    return mk.InterpretableMLP(FAMILY, [8, 8]), torch.randn(6, 7), torch.rand(6).round()


def sharded(part, net):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (1,))
    if part == "layers":
        for layer in net.layers:
            fully_shard(layer, mesh=mesh)
    module = {"sequence": net.layers, "around": Model(net)}.get(part, net)
    fully_shard(module, mesh=mesh)
    return module, [*module.parameters()]


def check(net, parameters, call, alone, x, y):
    loss = alone.gem_loss(x, y)
    expected = torch.autograd.grad(loss, [*alone.parameters()])
    for _ in range(2):
        ours = call(x, y)
        ours.backward()
        torch.testing.assert_close(ours, loss)
        for p, grad in zip(parameters, expected, strict=True):
            torch.testing.assert_close(p.grad.full_tensor(), grad)
            p.grad = None
        torch.testing.assert_close(net.predict(x), alone.predict(x))
        torch.testing.assert_close(net(x), alone(x))


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("part", ["net", "layers", "sequence"])
def test_a_sharded_mlp_has_its_loss_and_prediction(one_process, part, registered):
    from torch.distributed.fsdp import register_fsdp_forward_method

    alone, x, y = mlp()
    net = copy.deepcopy(alone)
    _, parameters = sharded(part, net)
    if registered:
        for name in ("gem_loss", "predict"):
            register_fsdp_forward_method(net, name)  # nothing, where net is not sharded itself
    check(net, parameters, net.gem_loss, alone, x, y)


def test_a_module_around_it_registers_its_own_method(one_process):
    from torch.distributed.fsdp import register_fsdp_forward_method

    alone, x, y = mlp()
    net = copy.deepcopy(alone)
    model, parameters = sharded("around", net)
    for call in (
        lambda: net.gem_loss(x, y),
        lambda: net.predict(x),
        lambda: net(x),
        lambda: net.layers[0](x),
        lambda: model.loss(x, y),
    ):
        with pytest.raises(mk.BackendError, match=r"register_fsdp_forward_method\(module, 'gem_lo"):
            call()
    register_fsdp_forward_method(model, "loss")
    loss = model.loss(x, y)
    loss.backward()
    grads = torch.autograd.grad(alone.gem_loss(x, y), [*alone.parameters()])
    for p, grad in zip(parameters, grads, strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), grad)
