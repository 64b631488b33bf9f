"""docs/distributed.md: its code runs, and does what its words say."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import maskmoe_kernels as mk
from tests.distributed.processes import in_processes

PAGE = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"
START = 'dist.init_process_group("gloo")  # "nccl" on GPUs\n'

if not PAGE.is_file():
    pytest.skip("not a checkout: there are no docs", allow_module_level=True)


def blocks() -> list[str]:
    found = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert START in found[0]
    return [found[0].replace(START, ""), *found[1:]]


def names_after(*parts: str) -> dict:
    """The script's names after its first block and those in which these words are."""
    start, *others = blocks()
    chosen = [block for block in others if any(part in block for part in parts)]
    assert len(chosen) == len(parts)
    names: dict = {}
    for block in (start, *chosen):
        exec(block, names)
    return names


def trained(net, x, y, steps=3, lr=0.001):
    optimizer = torch.optim.Adam(net.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        net.gem_loss(x, y).backward()
        optimizer.step()
    return net


def assert_close(found, expected):
    # Adam divides by the root of a squared gradient: rounding of a tiny one is magnified.
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def whole(net):
    return [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in net.parameters()]


def data_parallel():
    names = names_after("DistributedDataParallel(Loss(net))")
    alone = trained(names["make_net"](), names["x"], names["y"])
    assert_close(names["net"].parameters(), alone.parameters())
    assert dist.get_world_size() * len(names["x"][names["rows"]]) == 64


def test_data_parallel(tmp_path):
    in_processes(2, tmp_path, data_parallel)


def fsdp():
    names = names_after("fully_shard(net)")
    alone = trained(names["make_net"](), names["x"], names["y"])
    assert_close(whole(names["net"]), alone.parameters())
    names = names_after("register_fsdp_forward_method(model")
    alone = names["make_net"]()
    alone.gem_loss(names["x"], names["y"]).backward()
    grads = [p.grad.full_tensor() for p in names["model"].parameters()]
    assert_close(grads, [p.grad for p in alone.parameters()])


def test_fsdp(tmp_path):
    in_processes(2, tmp_path, fsdp)


def assembled(net, like):
    """The network of all experts, from the parts of all processes."""
    states = [None] * dist.get_world_size()
    dist.all_gather_object(states, {name: p.detach() for name, p in net.named_parameters()})
    state = {name: p for part in states for name, p in part.items()}
    assert sum(map(len, states)) == len(state)  # each parameter in one process
    with torch.no_grad():
        for k, layer in enumerate(like.layers):
            for name in ("weight", "bias"):
                parts = [state[f"layers.{k}.{name}.{i}"] for i in range(like.family.num_experts)]
                getattr(layer, name).copy_(torch.cat(parts))
    return like


def experts():
    names = names_after("class ExpertRows")
    net, x, y, family = (names[name] for name in ("net", "x", "y", "family"))
    alone = trained(names["make_net"](), x, y)
    assert_close(assembled(net, names["make_net"]()).parameters(), alone.parameters())
    stored = sum(p.numel() for p in net.parameters())
    total = sum(p.numel() for p in alone.parameters())
    assert stored < 0.7 * total  # none holds much more than its share
    for layer in net.layers:  # whole blocks
        assert layer.layout.num_weights == sum(p.numel() for p in layer.weight.values())

    fresh = names["make_net"]()
    alone = copy.deepcopy(fresh)
    names["split_experts"](fresh, names["mesh"])
    torch.testing.assert_close(fresh(x), alone(x))
    mk.gem_loss(fresh(x), y, family).backward()
    alone.gem_loss(x, y).backward()
    for of in (fresh, alone):
        for p in of.parameters():
            p.data = p.grad  # so that the gradients are put together
    assert_close(assembled(fresh, names["make_net"]()).parameters(), alone.parameters())
    return stored


def test_experts(tmp_path):
    in_processes(2, tmp_path, experts)
    in_processes(3, tmp_path, experts)


def clipped():
    names = names_after("class ExpertRows", "get_total_norm")
    x, y = names["x"], names["y"]
    alone = names["make_net"]()
    before = assembled(names["net"], names["make_net"]())
    leaf = x.detach().requires_grad_()
    mk.gem_loss(before(leaf), y, names["family"]).backward()
    torch.testing.assert_close(x.grad, leaf.grad)
    trained(alone, x.detach(), y, steps=2)
    alone.zero_grad()
    alone.gem_loss(x.detach(), y).backward()
    norm = torch.nn.utils.get_total_norm(p.grad for p in alone.parameters())
    torch.testing.assert_close(names["norm"].sqrt(), norm, rtol=1e-3, atol=0)


def test_norm_and_gradient_of_the_input(tmp_path):
    in_processes(2, tmp_path, clipped)


def save(folder):
    names = names_after("class ExpertRows", "def save")
    names["net"].zero_grad()
    names["save"](names["net"], names["optimizer"], folder / "experts")
    net = names["make_net"]()
    names["fully_shard"](net)
    optimizer = torch.optim.Adam(net.parameters())
    net.gem_loss(names["x"].detach(), names["y"]).backward()
    optimizer.step()
    names["save"](net, optimizer, folder / "fsdp")
    resumed = assembled(names["net"], names["make_net"]())
    return [p.detach() for p in resumed.parameters()], whole(net)


def load(folder):
    names = names_after("class ExpertRows", "def save")
    found = []
    for kind in ("experts", "fsdp"):
        net = mk.InterpretableMLP(names["family"], [16, 16])
        if kind == "experts":
            names["split_experts"](net, names["mesh"])
        else:
            names["fully_shard"](net)
        optimizer = torch.optim.Adam(net.parameters())
        names["load"](net, optimizer, folder / kind)
        assert {s["step"].item() for s in optimizer.state.values()} == {
            "experts": {3.0},
            "fsdp": {1.0},
        }[kind]
        if kind == "experts":
            net = assembled(net, names["make_net"]())
        found.append(whole(net))
    return tuple(found)


def test_checkpoints_are_loaded_by_any_number_of_processes(tmp_path):
    expected = in_processes(2, tmp_path, save, tmp_path)[0]
    for world in (1, 3):
        for found in in_processes(world, tmp_path, load, tmp_path):
            for ours, theirs in zip(found, expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
