"""Parameters that are DTensors, each process holding a shard: FSDP2's, say."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from maskmoe_kernels.ops.checks import is_sharded


def whole(parameter: Tensor) -> Tensor:
    """All of a parameter, gathered if it is a DTensor: then all processes have to call this."""
    gathered: Any = parameter
    return gathered.full_tensor() if is_sharded(parameter) else parameter


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """``value``, which all processes hold; as a DTensor, if ``parameter`` is one."""
    if not is_sharded(parameter):
        return value
    like: Any = parameter
    # Most programs have no need of it, and importing it takes a while.
    tensor = importlib.import_module("torch.distributed.tensor")
    sharded: Tensor = tensor.distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )
    return sharded
