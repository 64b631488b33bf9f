"""State dicts that went through the usual arithmetic, older ones, and other libraries'."""

import copy
import io

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import maskmoe_kernels as mk
from maskmoe_kernels.nn.attention import MaskedMultiheadAttention

FAMILY = mk.SubsetFamily.powerset({"a": 3, "b": 4})
SQUARE = torch.ones(4, 4)


class Model(nn.Module):
    def __init__(self, device=None):
        super().__init__()
        self.net = mk.InterpretableMLP(FAMILY, [5, [1, 2, 3]], device=device)
        self.attention = MaskedMultiheadAttention(FAMILY, 4, 2, device=device)


def model(seed=0):
    torch.manual_seed(seed)
    return Model()


def cast(dtype):
    return lambda a, b: {name: value.to(dtype) for name, value in a.items()}


def averaged(a, b):
    return {name: sum(s[name] for s in (a, b, a)) / 3 for name in a}


def moving_average(a, b):
    for _ in range(50):
        for name in a:
            a[name].mul_(0.999).add_(b[name], alpha=0.001)
    return a


def shrunk(a, b):
    for value in a.values():
        value.mul_(0.999).div_(3)
    return a


def noisy(a, b):
    return {name: value + 0.01 * torch.randn_like(value) for name, value in a.items()}


def steered(a, b):
    """a + 0.4 (b - a)."""
    return {name: torch.lerp(a[name].half(), b[name].half(), 0.4) for name in a}


def through_numpy(a, b):
    file = io.BytesIO()
    np.savez(file, **{name: value.numpy() for name, value in a.items()})
    file.seek(0)
    return {name: torch.from_numpy(value) for name, value in np.load(file).items()}


def through_flat_buffer(a, b):
    flat = torch.cat([value.flatten().half() for value in a.values()])
    parts = flat.split([value.numel() for value in a.values()])
    return {name: part.view(v.shape) for (name, v), part in zip(a.items(), parts, strict=True)}


ARITHMETIC = {
    "half": cast(torch.float16),
    "bfloat16": cast(torch.bfloat16),
    "double": cast(torch.float64),
    "half and back": lambda a, b: cast(torch.float32)(cast(torch.float16)(a, b), b),
    "8 bits": cast(torch.float8_e4m3fn),
    "averaged": averaged,
    "moving average": moving_average,
    "shrunk": shrunk,
    "noisy": noisy,
    "steered": steered,
    "numpy": through_numpy,
    "flat": through_flat_buffer,
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", ARITHMETIC)
def test_a_state_dict_loads_after(name, assign):
    states = [copy.deepcopy(model(seed).state_dict()) for seed in (1, 2)]
    state = ARITHMETIC[name](*states)
    target = model(3)
    target.load_state_dict(state, assign=assign)
    for key, value in target.named_parameters():
        torch.testing.assert_close(value, state[key].to(value.dtype))


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)])
@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_models_save_and_load(average, use_buffers):
    source = model(1)
    mean = AveragedModel(source, multi_avg_fn=average, use_buffers=use_buffers)
    for _ in range(3):
        with torch.no_grad():
            for p in source.parameters():
                p.add_(torch.randn_like(p))
        mean.update_parameters(source)
    other = AveragedModel(model(2), multi_avg_fn=average, use_buffers=use_buffers)
    other.load_state_dict(mean.state_dict())
    target = model(3)
    target.load_state_dict(mean.module.state_dict())
    for a, b, c in zip(*(m.parameters() for m in (mean, other, target)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_safetensors_round_trip(tmp_path):
    files = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    source, target = model(1), model(2)
    files.save_file(cast(torch.float16)(source.state_dict(), None), tmp_path / "half")
    target.load_state_dict(files.load_file(tmp_path / "half"))
    files.save_model(source, str(tmp_path / "whole"))
    files.load_model(target, str(tmp_path / "whole"))
    assert torch.equal(target.net.layers[0].weight, source.net.layers[0].weight)


def test_distributed_checkpoints_round_trip(tmp_path):
    source, target = model(1), model(2)
    dcp.save(source.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    state = target.state_dict()
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    target.load_state_dict(state)
    for a, b in zip(source.parameters(), target.parameters(), strict=True):
        assert torch.equal(a, b)


def test_loads_on_meta():
    state = cast(torch.float16)(model(1).state_dict(), None)
    target = Model(device="meta")
    target.load_state_dict(state, assign=True)
    assert torch.equal(target.net.layers[0].weight, state["net.layers.0.weight"])
    shapes = {name: value.to("meta") for name, value in state.items()}
    Model(device="meta").load_state_dict(shapes, assign=True)


# --- What does not load --------------------------------------------------------------------------


def layers():
    """Two layers whose weights are as many, in another order."""
    turned = SQUARE.tril().flip(0)
    return mk.MaskedLinear(4, 4, SQUARE.tril()), mk.MaskedLinear(4, 4, turned)


def old(layer):
    """As checkpoints were: the packing's number itself."""
    return layer.state_dict() | {"_extra_state": torch.tensor(layer.layout.packing_id)}


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.float32])
def test_older_checkpoints_load(dtype):
    source, other = layers()
    state = old(source)
    for number in (state["_extra_state"].to(dtype), state["_extra_state"].to(dtype)[None]):
        target = mk.MaskedLinear(4, 4, SQUARE.tril())
        target.load_state_dict(state | {"_extra_state": number})
        assert torch.equal(target.weight, source.weight)
    # Rounding hides at most the last digits of the number: another layout is still another.
    with pytest.raises(RuntimeError, match=r"another layout|copy it unchanged"):
        other.load_state_dict(state | {"_extra_state": state["_extra_state"].to(dtype)})


UNREADABLE = {
    "a cast number": lambda layer: torch.tensor(layer.layout.packing_id).to(torch.float16),
    "a rounded number": lambda layer: torch.tensor(layer.layout.packing_id).to(torch.bfloat16),
    "another number": lambda layer: torch.tensor(layer.layout.packing_id * 1.5),
    "nothing": lambda layer: torch.zeros(64),
    "NaN": lambda layer: torch.full((64,), torch.nan),
    "a difference": lambda layer: layer.get_extra_state() - layer.get_extra_state(),
    "half of it": lambda layer: layer.get_extra_state()[:32],
    "empty": lambda layer: torch.zeros(0),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_named(name):
    holder = nn.Sequential(layers()[0])
    state = holder.state_dict() | {"0._extra_state": UNREADABLE[name](holder[0])}
    with pytest.raises(RuntimeError, match=r"by 0\._extra_state: it cannot be read.*unchanged"):
        holder.load_state_dict(state)


@pytest.mark.parametrize("name", ARITHMETIC)
def test_another_layout_is_refused_after_arithmetic_too(name):
    one, other = layers()
    states = [copy.deepcopy(one.state_dict()) for _ in range(2)]
    with pytest.raises(RuntimeError, match=r"packing mismatch .* another layout"):
        other.load_state_dict(ARITHMETIC[name](*states))


def test_an_average_of_two_layouts_is_refused():
    one, other = layers()
    with pytest.raises(RuntimeError, match="cannot be read"):
        one.load_state_dict(averaged_pair(one.state_dict(), other.state_dict()))


def averaged_pair(a, b):
    return {name: (a[name] + b[name]) / 2 for name in a}


# --- Other libraries' masked layers --------------------------------------------------------------


class Degrees(nn.Linear):
    """A layer of MADE that keeps its mask and its units' degrees beside a dense weight."""

    def __init__(self, before, degrees):
        super().__init__(len(before), len(degrees))
        self.register_buffer("mask", (degrees[:, None] >= before).float())
        self.register_buffer("degrees", degrees)

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


def made():
    torch.manual_seed(0)
    before, degrees = torch.arange(1, 6), torch.arange(12) % 4 + 1
    return Degrees(before, degrees)


def test_degrees_of_units_are_taken_as_the_mask_is():
    theirs = made()
    ours = mk.MaskedLinear(5, 12, theirs.mask)
    x = torch.randn(3, 5)
    for other in (copy.deepcopy(theirs).half(), theirs):
        ours.load_state_dict(other.state_dict())
        torch.testing.assert_close(ours(x), copy.deepcopy(other).float()(x))
    alone = {k: v for k, v in theirs.state_dict().items() if k != "mask"}
    ours.load_state_dict(alone)


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        (torch.arange(12) % 4 + 2, None),  # as good: only their order says anything
        (torch.arange(12).flip(0) % 4, "sees more than one of a higher degree"),
        (torch.zeros(12), "less than one of the same"),
        (torch.arange(11), r"is \(11,\), this layer has 12 units"),
    ],
)
def test_degrees_that_do_not_fit_are_refused(degrees, message):
    theirs = made()
    ours = mk.MaskedLinear(5, 12, theirs.mask)
    state = theirs.state_dict() | {"degrees": degrees}
    if message is None:
        ours.load_state_dict(state)
        return
    with pytest.raises(RuntimeError, match="degrees mismatch for degrees: .*" + message):
        ours.load_state_dict(state)
