"""An optimizer goes on after its dense masked layers were replaced by packed ones."""

import copy

import pytest
import torch
from torch import nn

from maskmoe_kernels import LayoutError, MaskedLinear
from maskmoe_kernels.nn import pack_optimizer_state

OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, 0.01),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "SGD momentum": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.001, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.01),
    "two groups": lambda p: torch.optim.Adam([{"params": p[:1], "lr": 0.02}, {"params": p[1:]}]),
}


class Dense(nn.Linear):
    """As other libraries do it: all weights are kept, and the mask multiplied."""

    def __init__(self, mask):
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask)

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


def models():
    torch.manual_seed(0)
    masks = torch.rand(6, 5) < 0.5, torch.ones(4, 6).tril().bool()
    dense = nn.Sequential(Dense(masks[0]), nn.Tanh(), Dense(masks[1]), nn.Linear(4, 1)).double()
    packed = copy.deepcopy(dense)
    for k in (0, 2):
        packed[k] = MaskedLinear.from_linear(dense[k], dense[k].mask)
    return dense, packed


def steps(model, optimizer, count):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(32, 1, generator=generator, dtype=torch.float64)
    for _ in range(count):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return model(x)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on(name):
    dense, packed = models()
    optimizer = OPTIMIZERS[name]([*dense.parameters()])
    steps(dense, optimizer, 3)
    checkpoint = copy.deepcopy((dense.state_dict(), optimizer.state_dict()))
    expected = steps(dense, optimizer, 4)
    state = copy.deepcopy(checkpoint[1])

    packed.load_state_dict(checkpoint[0])
    resumed = OPTIMIZERS[name]([*packed.parameters()])
    resumed.register_load_state_dict_pre_hook(pack_optimizer_state(packed))
    resumed.load_state_dict(checkpoint[1])
    for number, of in state["state"].items():  # what was given is as it was
        for key, value in of.items():
            torch.testing.assert_close(checkpoint[1]["state"][number][key], value)
    torch.testing.assert_close(steps(packed, resumed, 4), expected, rtol=1e-6, atol=1e-9)
    again = OPTIMIZERS[name]([*packed.parameters()])
    again.register_load_state_dict_pre_hook(pack_optimizer_state(packed))
    again.load_state_dict(resumed.state_dict())  # its own, which is packed
    for parameter, of in resumed.state.items():
        for key, value in of.items():
            torch.testing.assert_close(again.state[parameter][key], value)


def test_without_the_hook_the_next_step_fails():
    dense, packed = models()
    optimizer = torch.optim.Adam(dense.parameters())
    steps(dense, optimizer, 1)
    resumed = torch.optim.Adam(packed.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="size"):
        steps(packed, resumed, 1)


@pytest.mark.parametrize("name", ["Adafactor", "another layer"])
def test_what_cannot_be_packed_is_refused_while_loading(name):
    dense, packed = models()
    make = torch.optim.Adafactor if name == "Adafactor" else torch.optim.Adam
    optimizer = make(dense.parameters())
    steps(dense, optimizer, 1)
    state = optimizer.state_dict()
    if name == "another layer":
        state["state"][0]["exp_avg"] = torch.zeros(7, 5)
    resumed = make(packed.parameters())
    resumed.register_load_state_dict_pre_hook(pack_optimizer_state(packed))
    with pytest.raises(LayoutError, match=r"of 0\.weight is .* must be \(\d+,\), or \(6, 5\)"):
        resumed.load_state_dict(state)
    state["state"] = {k: of for k, of in state["state"].items() if k not in (0, 2)}
    resumed.load_state_dict(state)  # as the error says
    steps(packed, resumed, 1)
