"""FSDP2 in two processes: packed weights are cut anywhere, and gathered before a layer runs."""

import copy

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

import maskmoe_kernels as mk
from tests.distributed.cases import (
    FAMILY,
    WIDTHS,
    Loss,
    assert_same,
    case,
    gradients,
    mine,
    ncf_case,
)
from tests.distributed.processes import in_processes
from tests.models.sessions import batch


def steps(model: nn.Module, loss, batch):
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        loss(*batch).backward()
        optimizer.step()
    return optimizer


def whole(model):
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]


def networks():
    net, x, y = case()
    alone = copy.deepcopy(net)
    loss = alone.gem_loss(x, y)
    loss.backward()
    trained = copy.deepcopy(net)
    steps(trained, trained.gem_loss, (x, y))
    sizes = []
    for part in ("network", "each layer", "module around it"):
        of = copy.deepcopy(net)
        model = Loss(of)
        for layer in of.layers if part == "each layer" else ():
            fully_shard(layer)
        fully_shard(model if part == "module around it" else of)
        sizes = [p.to_local().numel() for p in of.parameters()]
        model(mine(x), mine(y)).backward()
        assert_same(gradients(of), gradients(alone), part)
        norm = nn.utils.clip_grad_norm_(of.parameters(), 1e9).full_tensor()
        torch.testing.assert_close(norm, nn.utils.get_total_norm(gradients(alone)))
        of.zero_grad()
        steps(of, model, (mine(x), mine(y)))
        # Adam divides by the root of a squared gradient: rounding of a tiny one is magnified.
        for ours, theirs in zip(whole(of), trained.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    return sizes


def test_gradients_and_steps_are_those_of_one_process(tmp_path):
    net, _, _ = case()
    shards = in_processes(2, tmp_path, networks)
    total = [a + b for a, b in zip(*shards, strict=True)]
    assert total == [p.numel() for p in net.parameters()]
    assert shards[0][0] not in net.layers[0].layout.weight_offsets  # cut inside of a block


def in_16_bits():
    net, x, y = case()
    half = copy.deepcopy(net).bfloat16()
    half.gem_loss(x.bfloat16(), y).backward()
    fully_shard(net, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    net.gem_loss(mine(x), mine(y)).backward()
    for ours, theirs in zip(gradients(net), gradients(half), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs.float(), rtol=0.05, atol=0.01)


def test_mixed_precision(tmp_path):
    in_processes(2, tmp_path, in_16_bits)


def from_meta():
    with torch.device("meta"):
        net = mk.InterpretableMLP(FAMILY, WIDTHS)
    fully_shard(net)
    net.to_empty(device="cpu")
    torch.manual_seed(0)
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    bounds = []
    for layer in net.layers:
        seen = layer.layout.mask().sum(1)
        largest = layer.dense_weight().abs().amax(1) * seen.sqrt()
        assert (largest <= 1).all()
        bounds.append(largest.max().item())
        assert torch.equal(layer.dense_weight() != 0, layer.layout.mask())
        linear = layer.to_linear()
        assert torch.equal(linear.bias, layer.bias.full_tensor())
    assert min(bounds) > 0.9  # by the fan-in of its own unit, wherever the shards are cut
    return net.gem_loss(torch.randn(4, 9), torch.ones(4)).item()


def test_created_without_memory_and_initialised_in_shards(tmp_path):
    in_processes(2, tmp_path, from_meta)


def dense_state():
    net, x, _ = case()
    state = {}
    for k, layer in enumerate(net.layers):  # as one nn.Linear after another saves it
        state |= {f"layers.{k}.{n}": p for n, p in layer.to_linear().state_dict().items()}
    packed = net.state_dict()
    expected = net(x)
    for given in (state, packed):
        of = mk.InterpretableMLP(FAMILY, WIDTHS)
        fully_shard(of)
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(of, dict(given), options=options)  # it changes what it is given
        assert isinstance(of, FSDPModule)
        assert all(hasattr(p, "full_tensor") for p in of.parameters())
        full = get_model_state_dict(of, options=options)
        assert all(torch.equal(full[name], packed[name]) for name in packed)
        torch.testing.assert_close(of(x), expected)


def test_dense_and_packed_checkpoints_load_into_shards(tmp_path):
    in_processes(2, tmp_path, dense_state)


def ncf():
    net, batch = ncf_case()
    alone = copy.deepcopy(net)
    alone.gem_loss(*batch).backward()
    for registered in (False, True):
        of = copy.deepcopy(net)
        fully_shard(of)
        if registered:
            register_fsdp_forward_method(of, "gem_loss")
        of.gem_loss(*map(mine, batch)).backward()
        assert_same(gradients(of), gradients(alone), f"NCF, registered {registered}")


def test_rows_of_embeddings(tmp_path):
    in_processes(2, tmp_path, ncf)


def session_models():
    for kind in (mk.InterpretableTransformer, mk.InterpretableGRU):
        torch.manual_seed(0)
        net = kind(FAMILY, {"c": 2, "a": 1}, width=4, layers=2)
        data = batch(net, sessions=4, dtype=torch.float32)
        y = torch.rand(4, 4).round()
        alone = copy.deepcopy(net)
        mk.gem_loss(alone(*data), y, FAMILY).backward()
        layers = [m for m in net.modules() if isinstance(m, mk.MaskedLinear)]
        for parts in ([], [*net.children()], layers):
            of = copy.deepcopy(net)
            names = [name for name, module in net.named_modules() if module in parts]
            for name in names:
                if not isinstance(of.get_submodule(name), nn.ModuleList):
                    fully_shard(of.get_submodule(name))
            fully_shard(of)
            mk.gem_loss(of(*map(mine, data)), mine(y), FAMILY).backward()
            assert_same(gradients(of), gradients(alone), f"{kind.__name__}, {len(parts)} parts")


def test_models_of_sessions(tmp_path):
    in_processes(2, tmp_path, session_models)
