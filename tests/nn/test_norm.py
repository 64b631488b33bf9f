"""``ExpertNorm`` against one ``nn.LayerNorm`` per expert."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from maskmoe_kernels import LayoutError, SubsetFamily
from maskmoe_kernels.nn import ExpertNorm
from maskmoe_kernels.testing import assert_blind
from maskmoe_kernels.testing.strategies import families
from tests.arrival import assert_arrives
from tests.nn.per_expert import gradients, seeds, widths

CUBE = SubsetFamily.powerset({"a": 2, "b": 3, "c": 1})


@st.composite
def norms(draw, dtype=torch.float64):
    family = draw(families(8))
    width = draw(widths(family, (1, 2, 3, 7, 16)))
    affine, bias = draw(st.sampled_from([(True, True), (True, False), (False, False)]))
    torch.manual_seed(draw(seeds))
    norm = ExpertNorm(family, width, 1e-3, affine, bias, dtype=dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm, torch.randn(3, 2, norm.features, dtype=dtype)


@given(norms())
def test_equals_one_layer_norm_per_expert(case):
    norm, x = case
    x.requires_grad_()
    weight = torch.ones(norm.features).double() if norm.weight is None else norm.weight
    bias = torch.zeros(norm.features).double() if norm.bias is None else norm.bias
    parts = []
    for part, w, b in zip(*(t.split(norm.widths, -1) for t in (x, weight, bias)), strict=True):
        layer = nn.LayerNorm(part.shape[-1], 1e-3, dtype=torch.float64)
        parameters = {"weight": w, "bias": b}
        parts.append(torch.func.functional_call(layer, parameters, (part,)))
    expected, inputs = torch.cat(parts, -1), [x, *norm.parameters()]
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(gradients(norm(x), inputs), gradients(expected, inputs))


@given(norms(dtype=torch.float32))
def test_experts_do_not_see_each_other(case):
    norm, x = case
    owner = torch.arange(len(norm.widths)).repeat_interleave(torch.tensor(norm.widths))
    assert_blind(norm, x, owner[:, None] == owner)
    assert_arrives(norm, x[0, 0], owner[:, None] == owner)


@pytest.mark.parametrize("width", [4, [4, 1, 3, 2, 5, 6, 2]], ids=["uniform", "ragged"])
def test_behaves_like_torch(width):
    norm = ExpertNorm(CUBE, width)
    x = torch.randn(5, norm.features)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), norm(x))
    torch.testing.assert_close(copy.deepcopy(norm)(x), norm(x))
    assert norm(x[:0]).shape == (0, norm.features)
    torch.testing.assert_close(norm(x[0]), norm(x)[0])
    assert set(norm.state_dict()) == {"weight", "bias"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = norm(x.bfloat16())
    torch.testing.assert_close(low.float(), norm(x.bfloat16().float()), rtol=2e-2, atol=2e-2)
    half = copy.deepcopy(norm).bfloat16()(x.bfloat16())
    torch.testing.assert_close(half.float(), norm(x.bfloat16().float()), rtol=2e-2, atol=2e-2)


def test_starts_as_torch_does():
    norm, layer = ExpertNorm(SubsetFamily({"a": 1}, {"all": ["a"]}), 9), nn.LayerNorm(9)
    x = torch.randn(4, 9)
    assert torch.equal(norm.weight, layer.weight)
    assert torch.equal(norm.bias, layer.bias)
    torch.testing.assert_close(norm(x), layer(x))


def test_errors_carry_the_values():
    with pytest.raises(LayoutError, match=r"x must be \(\*, 28\), got \(2, 3\)"):
        ExpertNorm(CUBE, 4)(torch.ones(2, 3))
    with pytest.raises(LayoutError, match=r"x must be \(\*, 28\), got \(\)"):
        ExpertNorm(CUBE, 4)(torch.ones(()))
    with pytest.raises(LayoutError, match="width must have 7 entries, got 2"):
        ExpertNorm(CUBE, [4, 4])
