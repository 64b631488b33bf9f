"""DCP: what two processes save, one and three load, optimizer included."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import maskmoe_kernels as mk
from tests.distributed.cases import FAMILY, WIDTHS, case, mine
from tests.distributed.processes import in_processes


def trained(net, x, y, steps, optimizer=None):
    optimizer = optimizer or torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        net.gem_loss(x, y).backward()
        optimizer.step()
    return optimizer


def whole(net):
    return [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in net.parameters()]


def save(folder):
    net, x, y = case()
    fully_shard(net)
    optimizer = trained(net, mine(x), mine(y), 2)
    model, state = get_state_dict(net, optimizer)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder)
    trained(net, mine(x), mine(y), 1, optimizer)
    return whole(net)


def load(folder, shard=True):
    """Resume in as many processes as there are."""
    _, x, y = case()
    torch.manual_seed(7)
    net = mk.InterpretableMLP(FAMILY, WIDTHS)
    if shard:
        fully_shard(net)
    optimizer = torch.optim.Adam(net.parameters(), 0.5)
    model, state = get_state_dict(net, optimizer)
    dcp.load({"model": model, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(net, optimizer, model_state_dict=model, optim_state_dict=state)
    trained(net, mine(x), mine(y), 1, optimizer)
    return whole(net)


def test_two_save_and_one_and_three_resume(tmp_path):
    expected = in_processes(2, tmp_path, save, tmp_path / "checkpoint")[0]
    for world in (1, 2, 3):
        for found in in_processes(world, tmp_path, load, tmp_path / "checkpoint"):
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    unsharded = in_processes(1, tmp_path, load, tmp_path / "checkpoint", False)[0]
    for ours, theirs in zip(unsharded, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def another_layout(folder):
    family = mk.SubsetFamily.powerset({"b": 4, "a": 3, "c": 2})
    net = mk.InterpretableMLP(family, WIDTHS)
    fully_shard(net)
    state = net.state_dict()
    dcp.load(state, checkpoint_id=folder)
    with pytest.raises(RuntimeError, match=r"mismatch for layers\.0\.weight.*another layout"):
        net.load_state_dict(state)


def save_model(folder):
    net, _, _ = case()
    fully_shard(net)
    dcp.save(net.state_dict(), checkpoint_id=folder)


def test_a_checkpoint_of_another_layout_is_refused(tmp_path):
    in_processes(2, tmp_path, save_model, tmp_path / "checkpoint")
    in_processes(2, tmp_path, another_layout, tmp_path / "checkpoint")
