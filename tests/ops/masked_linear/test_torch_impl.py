"""The PyTorch fallback: what its products round, and how often."""

import pytest
import torch

import maskmoe_kernels as mk
from maskmoe_kernels.ops.masked_linear import torch_impl

#: One row block that sees three column blocks, none beside another: three runs.
APART = mk.BlockLayout([16], [16] * 5, torch.tensor([[True, False, True, False, True]]))
#: Its counterpart: one column block that three row blocks route a gradient to.
TURNED = mk.BlockLayout([16] * 5, [16], torch.tensor([[True], [False], [True], [False], [True]]))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 2048), (torch.bfloat16, 256)], ids=str)
def test_sixteen_bits_are_rounded_once_not_once_a_run(dtype, most):
    """Beyond ``most``, odd numbers are not to be had: 1 and 1 count together or not at all."""
    assert not torch_impl._schedule(APART).dense
    assert len(torch_impl._schedule(APART).rows[0].runs) == 3
    terms = torch.tensor([most, 1.0, 1.0]).repeat_interleave(16) / 16
    for bias in (None, torch.zeros(16, dtype=dtype)):
        x = torch.ones(3, 80, dtype=dtype)
        weight = terms.repeat_interleave(16).to(dtype)
        y = mk.masked_linear(x, weight, bias, APART, backend="torch")
        assert torch.equal(y, torch.full_like(y, most + 2))
    x = torch.zeros(3, 16, dtype=dtype, requires_grad=True)
    y = mk.masked_linear(x, weight, None, TURNED, backend="torch")
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(grad, torch.full_like(grad, most + 2))
