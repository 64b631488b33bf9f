"""accelerate: prepared models train, are saved and resumed with the same bits, and offloaded."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import maskmoe_kernels as mk
from tests.distributed.cases import Loss

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from accelerate.state import AcceleratorState, PartialState

FAMILY = mk.SubsetFamily.powerset({"a": 3, "b": 4, "c": 2})


@pytest.fixture(autouse=True)
def one_accelerator_a_test():
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
    assert not PartialState._shared_state


def case():
    torch.manual_seed(0)
    net = mk.InterpretableMLP(FAMILY, [8, 8])
    return net, torch.randn(12, 9), torch.rand(12).round()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_is_resumed_with_the_same_bits(precision, tmp_path):
    net, x, y = case()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    model = Loss(net)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    data = DataLoader(TensorDataset(x, y), batch_size=4)
    model, optimizer, scheduler, data = accelerator.prepare(model, optimizer, scheduler, data)

    def epoch():
        for xb, yb in data:
            with accelerator.accumulate(model):
                optimizer.zero_grad()
                accelerator.backward(model(xb, yb))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
        return [p.detach().clone() for p in model.parameters()]

    first = epoch()
    accelerator.save_state(str(tmp_path))
    second = epoch()
    assert not any(map(torch.equal, first, second))
    accelerator.load_state(str(tmp_path))
    assert all(map(torch.equal, first, model.parameters()))
    assert all(map(torch.equal, second, epoch()))
    assert accelerator.unwrap_model(model).net is net


def test_mixed_precision_of_a_network_is_autocast():
    net, x, y = case()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(copy.deepcopy(net))
    with torch.autocast("cpu", torch.bfloat16):
        expected = mk.gem_loss(net(x).float(), y, FAMILY)  # accelerate returns float32
    for loss in (prepared.gem_loss(x, y), mk.gem_loss(prepared(x), y, FAMILY)):
        torch.testing.assert_close(loss, expected)
    assert abs(expected - net.gem_loss(x, y)) > 1e-6  # 16 bits were at work


def test_saved_models_load_elsewhere(tmp_path):
    files = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    net, x, _ = case()
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.save_model(accelerator.prepare(net), str(tmp_path))
    state = files.load_file(tmp_path / "model.safetensors")
    target = mk.InterpretableMLP(FAMILY, [8, 8])
    target.load_state_dict(state)
    assert torch.equal(target(x), net(x))


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_are_there_while_a_layer_runs(where, tmp_path):
    net, x, y = case()
    offloaded = copy.deepcopy(net)
    if where == "cpu":
        accelerate.cpu_offload(offloaded, execution_device="cpu")
    else:
        accelerate.disk_offload(offloaded, str(tmp_path), execution_device="cpu")
    assert offloaded.layers[0].weight.is_meta
    assert "replaced" in offloaded.layers.unsupported_reason()
    for _ in range(2):
        torch.testing.assert_close(offloaded(x), net(x))
        torch.testing.assert_close(offloaded.gem_loss(x, y), net.gem_loss(x, y))
        ours, theirs = offloaded.predict(x), net.predict(x)
        torch.testing.assert_close(ours.attribution, theirs.attribution)
    assert offloaded.layers[0].weight.is_meta


@pytest.mark.parametrize("buffers", [False, True])
def test_a_network_without_memory_is_filled(buffers, tmp_path):
    files = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    net, x, y = case()
    path = str(tmp_path / "model.safetensors")
    files.save_model(net, path, metadata={"format": "pt"})

    def empty():
        with accelerate.init_empty_weights(include_buffers=buffers):
            return mk.InterpretableMLP(FAMILY, [8, 8])

    filled = empty()
    assert filled.layers[0].weight.is_meta
    filled.load_state_dict(files.load_file(path), assign=True)
    accelerate.dispatch_model(filled, {"": "cpu"})
    other = mk.InterpretableMLP(FAMILY, [8, 8])
    accelerate.load_checkpoint_in_model(other, path)
    for model in (filled, other):
        torch.testing.assert_close(model(x), net(x))
        torch.testing.assert_close(model.gem_loss(x, y), net.gem_loss(x, y))
        torch.testing.assert_close(model.predict(x).probability, net.predict(x).probability)
    # With a device_map, accelerate puts each tensor in its place itself, and knows parameters and
    # buffers only: a module with an extra state is refused, whichever it is.
    with pytest.raises(ValueError, match="_extra_state"):
        accelerate.load_checkpoint_and_dispatch(empty(), path, {"": "cpu"})
