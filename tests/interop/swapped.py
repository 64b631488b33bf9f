"""Other libraries' masked layers, replaced by ours one by one."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from maskmoe_kernels import MaskedLinear


def swapped(model: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A copy of ``model`` in which each layer of a ``kind`` with a ``mask`` is ours."""
    model = copy.deepcopy(model)
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if isinstance(child, kind):
                setattr(module, name, MaskedLinear.from_linear(child, child.mask))
    assert not any(isinstance(module, kind) for module in model.modules())
    assert any(isinstance(module, MaskedLinear) for module in model.modules())
    return model


def clusters(n: int, seed: int = 0) -> Tensor:
    """Points ``(n, 3)`` whose coordinates depend on those before."""
    generator = torch.Generator().manual_seed(seed)
    a, b, c = torch.randn(3, n, generator=generator)
    x = a.sign() * 2 + 0.3 * a
    y = x.square() / 2 + 0.3 * b
    return torch.stack([x, y, y * x.sign() / 2 + 0.3 * c], -1)


def trained(parameters, loss, steps: int = 60) -> list[float]:
    """The loss at each step of Adam."""
    optimizer = torch.optim.Adam(parameters, 0.01)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def assert_samples_like(samples: Tensor, data: Tensor) -> None:
    """Both have about the same means and spreads."""
    assert samples.isfinite().all()
    spread = data.std(0)
    assert ((samples.mean(0) - data.mean(0)).abs() < 0.5 * spread).all()
    assert ((samples.std(0) / spread - 1).abs() < 0.5).all()
