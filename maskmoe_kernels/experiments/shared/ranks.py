"""The processes of a data-parallel run, as torchrun starts them; one process is such a run too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        device: Where this process computes.
        rank: Its number, from 0.
        world: Number of processes.
    """

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Is this the process that writes and prints?"""
        return self.rank == 0

    @property
    def sums_sparse(self) -> bool:
        """Can gradients be sparse? Among several GPUs, nccl sums dense ones only."""
        return self.world == 1 or self.device.type == "cpu"

    def sum(self, value: Tensor) -> Tensor:
        """Sum over all processes; ``value`` itself where there is one."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model whose backward averages the gradients of all processes."""
        if self.world == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)


@contextmanager
def joined(device: str = "cpu") -> Iterator[Ranks]:
    """Join the processes that torchrun names in the environment; without it, stand alone.

    Args:
        device: ``cpu`` (gloo), or ``cuda`` (nccl), of which every process takes its own.
    """
    if not dist.is_torchelastic_launched():
        yield Ranks(torch.device(device))
        return
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Ranks(place, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
