"""A network, a batch and its part of each process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

import maskmoe_kernels as mk
from maskmoe_kernels.models.ncf import InterpretableNCF, NCFSizes

FAMILY = mk.SubsetFamily.powerset({"a": 3, "b": 4, "c": 2})
WIDTHS = [5, [1, 2, 3, 4, 5, 6, 7]]


class Loss(nn.Module):
    """Its call is the one-pass loss: what wraps a module sees calls only."""

    def __init__(self, net: mk.InterpretableMLP) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor, **options) -> Tensor:
        return self.net.gem_loss(x, y, **options)


def case(batch: int = 12) -> tuple[mk.InterpretableMLP, Tensor, Tensor]:
    """The same in every process."""
    torch.manual_seed(0)
    net = mk.InterpretableMLP(FAMILY, WIDTHS)
    return net, torch.randn(batch, 9), torch.rand(batch).round()


def ncf_case() -> tuple[InterpretableNCF, tuple[Tensor, ...]]:
    """A network with rows of embeddings, and a batch with its labels."""
    torch.manual_seed(0)
    net = InterpretableNCF(NCFSizes(5, 7), (4, 3))
    n = 12
    codes = torch.stack([torch.randint(k, (n,)) for k in (2, 7, 21)], -1)
    ids = torch.randint(5, (n,)), torch.randint(7, (n,))
    return net, (*ids, codes, torch.randn(n, 19), torch.rand(n).round())


def mine(batch: Tensor) -> Tensor:
    """This process's part of the rows."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def gradients(net: nn.Module) -> list[Tensor]:
    """Of all parameters, gathered where they are sharded."""
    grads = [p.grad for p in net.parameters()]
    return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]


def assert_same(found: list[Tensor], expected: list[Tensor], message: str = "") -> None:
    for k, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        where = f"{message}, {k}: "
        torch.testing.assert_close(ours, theirs, msg=where.__add__)
