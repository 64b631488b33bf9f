"""``StackedLinear``: several masked maps as one, or some of them."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskmoe_kernels import BlockLayout, LayoutError, masked_linear
from maskmoe_kernels.nn import StackedLinear
from maskmoe_kernels.testing.strategies import layouts
from tests.nn.per_expert import gradients, seeds

RUNS = ((0, 1), (1, 3), (2, 3), (0, 3))


@given(layouts(6), st.booleans(), seeds)
def test_maps_are_those_of_the_layout(layout, bias, seed):
    torch.manual_seed(seed)
    if layout.row_order is not None:
        with pytest.raises(LayoutError, match="block after block to be stacked"):
            StackedLinear.repeat(layout, 3, bias)
        return
    stacked = StackedLinear.repeat(layout, 3, bias, runs=RUNS, dtype=torch.float64)
    x = torch.randn(2, layout.in_features, dtype=torch.float64, requires_grad=True)
    weights = stacked.weight.chunk(3)
    biases = stacked.bias.chunk(3) if bias else [None] * 3
    maps = [masked_linear(x, w, b, layout) for w, b in zip(weights, biases, strict=True)]
    leaves = [x, *stacked.parameters()]
    dense = torch.cat([layout.unpack(w) for w in weights])
    assert torch.equal(stacked.dense_weight(), dense)
    for module in (stacked, copy.deepcopy(stacked)):
        torch.testing.assert_close(module(x), torch.cat(maps, -1))
        for first, last in RUNS:
            torch.testing.assert_close(module.run(x, first, last), torch.cat(maps[first:last], -1))
    for first, last in RUNS:
        ours, expected = stacked.run(x, first, last), torch.cat(maps[first:last], -1)
        torch.testing.assert_close(gradients(ours, leaves, seed), gradients(expected, leaves, seed))


def test_a_run_computes_its_own_maps_alone():
    """NaN in what one map reads reaches no gradient of another, which has other inputs."""
    layout = BlockLayout([3, 2], [2, 5], torch.tensor([[1, 0], [1, 1]]).bool())
    stacked = StackedLinear.repeat(layout, 3, runs=RUNS)
    x = torch.full((4, layout.in_features), torch.nan)
    for first, last in RUNS:
        y = stacked.run(x, first, last)
        grads = torch.autograd.grad(y, [stacked.weight, stacked.bias], torch.ones_like(y))
        weight, bias = (grad.view(3, -1) for grad in grads)
        own = (torch.arange(3) >= first) & (torch.arange(3) < last)
        assert torch.equal(weight.isnan(), own[:, None].expand_as(weight))
        assert torch.equal(bias, 4.0 * own[:, None].expand_as(bias))
