"""Classes of tensors that the ops are given."""

from __future__ import annotations

from torch import Tensor, nn

from maskmoe_kernels.errors import BackendError

#: Classes that add nothing to a tensor; ``NoneType`` for a bias that is not there.
PLAIN = (nn.Parameter, Tensor, type(None))


def refuse_sharded(x: Tensor | None, *parameters: Tensor | None) -> None:
    """Raise BackendError if a parameter is a DTensor and ``x`` is none."""
    if _is_sharded(x):
        return  # the user's own sharding strategies may know the op
    for parameter in parameters:
        if _is_sharded(parameter):
            raise BackendError(
                "the parameters are DTensors and the input is none: fully_shard gathers them "
                "while the module that it was given is called. Call that module, or a method of "
                "it that is registered: torch.distributed.fsdp.register_fsdp_forward_method("
                "module, 'gem_loss')"
            )


def _is_sharded(tensor: Tensor | None) -> bool:
    # By name: most programs have no need of torch.distributed.tensor, and have not imported it.
    return type(tensor).__module__.startswith("torch.distributed.tensor")
