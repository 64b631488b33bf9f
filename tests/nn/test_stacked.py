"""``StackedLinear``: several masked maps as one, or some of them."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskmoe_kernels import LayoutError, masked_linear
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
