"""Where nothing routes a gradient, or nothing is present, gradients are zeros and never None."""

import itertools

import pytest
import torch

import maskmoe_kernels as mk
from tests.ops import runners

NONE, ALL = torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)
FIRST = torch.tensor([[True, False, False], [False, False, False]])
TURNED = torch.tensor([4, 3, 2, 1, 0]), torch.tensor([5, 4, 3, 2, 1, 0])
LAYOUTS = {
    "no route": mk.BlockLayout([2, 3], [1, 2, 3], ALL, NONE),
    "no block": mk.BlockLayout([2, 3], [1, 2, 3], NONE),
    "one block, no route": mk.BlockLayout([2, 3], [1, 2, 3], FIRST, NONE),
    "one route": mk.BlockLayout([2, 3], [1, 2, 3], ALL, FIRST),
    "interleaved, no route": mk.BlockLayout(
        [2, 3], [1, 2, 3], ALL, NONE, row_order=TURNED[0], col_order=TURNED[1]
    ),
}


@pytest.mark.parametrize("runner", runners.RUNNERS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
def test_whoever_asks_has_a_gradient(name, bias, runner):
    layout = LAYOUTS[name]
    torch.manual_seed(0)
    values = torch.randn(4, 6), torch.randn(layout.num_weights), torch.randn(5) if bias else None
    grad_y = torch.randn(4, 5)
    dense = [None if v is None else v.double().requires_grad_() for v in values]
    x, weight, b = dense
    seen = torch.nn.functional.linear(x.detach(), layout.unpack(weight), b)
    routed = x @ (layout.unpack(weight.detach()) * layout.grad_mask()).T
    expected = torch.autograd.grad(
        seen + routed - routed.detach(), [v for v in dense if v is not None], grad_y.double()
    )
    for asked in itertools.product((False, True), repeat=3):
        inputs = [None if v is None else v.clone() for v in values]
        wanted = [v for v, a in zip(inputs, asked, strict=True) if a and v is not None]
        if not wanted:
            continue
        for v in wanted:
            v.requires_grad_()
        y = runners.masked_linear(*inputs, layout, None, runner)
        y.backward(grad_y)
        given = [v for v in inputs if v is not None]
        for v, true in zip(given, expected, strict=True):
            if v.requires_grad:
                assert v.grad is not None
                torch.testing.assert_close(v.grad, true.float())
            else:
                assert v.grad is None


@pytest.mark.parametrize("backend", [None, "native", "torch", "reference"])
@pytest.mark.parametrize("asked", ["x", "weights", "all"])
def test_a_network_that_routes_nothing_gives_its_input_zeros(backend, asked):
    family = mk.SubsetFamily.powerset({"a": 2, "b": 1})
    default = family.input_layout(4)
    held = mk.BlockLayout(
        default.row_sizes, default.col_sizes, default.present, torch.zeros_like(default.present)
    )
    net = mk.InterpretableMLP(family, [4], input_layout=held, backend=backend)
    net.requires_grad_(asked != "x")
    x = torch.randn(5, 3, requires_grad=asked != "weights")
    for loss in (net.gem_loss(x, torch.ones(5)), net(x).square().sum()):
        net.zero_grad()
        x.grad = None
        loss.backward()
        if asked != "weights":
            assert torch.equal(x.grad, torch.zeros(5, 3))
        if asked != "x":
            assert all(p.grad.any() for p in net.parameters())
