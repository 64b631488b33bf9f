"""Do the tensors of a call fit its layouts? For the front ends, and for ops called by name.

Shapes, dtypes and devices, which cost no look at a tensor's values. The C++ kernels check theirs in
``csrc/common/checks.h``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maskmoe_kernels.errors import BackendError, LayoutError
from maskmoe_kernels.layout.arguments import check_kind, described
from maskmoe_kernels.layout.blocks import BlockLayout

#: Classes that add nothing to a tensor; ``NoneType`` for a bias that is not there.
PLAIN = (nn.Parameter, Tensor, type(None))


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, layout: BlockLayout) -> None:
    """Raise LayoutError unless these are a masked linear map's; see :func:`masked_linear`."""
    if not isinstance(weight, Tensor) or not isinstance(bias, (Tensor, type(None))):
        check_kind(Tensor, weight=weight, bias=weight if bias is None else bias)
    # Layers can be so small that looking twice would show.
    dtype, device = x.dtype, x.device
    if (
        x.dim() == 0
        or x.size(-1) != layout.in_features
        or weight.dim() != 1
        or weight.numel() != layout.num_weights
        or weight.dtype != dtype
        or weight.device != device
        or not dtype.is_floating_point
    ):
        _explain(x, weight, bias, layout)
    if bias is not None and (
        bias.dim() != 1
        or bias.numel() != layout.out_features
        or bias.dtype != dtype
        or bias.device != device
    ):
        _explain(x, weight, bias, layout)


def _explain(x: Tensor, weight: Tensor, bias: Tensor | None, layout: BlockLayout) -> None:
    if not x.is_floating_point():
        raise LayoutError(f"x must be floating-point, got {x.dtype}; convert it first")
    if x.dim() == 0 or x.shape[-1] != layout.in_features:
        raise LayoutError(
            f"x must be (*, in_features) with in_features={layout.in_features}, got "
            f"{tuple(x.shape)}"
        )
    layout.check_weight(weight)
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != layout.out_features):
        raise LayoutError(
            f"bias must be (out_features,) = ({layout.out_features},), got {tuple(bias.shape)}"
        )
    check_places(x, weight, bias)


def check_places(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise LayoutError unless all have one dtype and device."""
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and (other.dtype != x.dtype or other.device != x.device):
            raise LayoutError(
                f"x is {x.dtype} on {x.device} but {name} is {other.dtype} on {other.device}; "
                "move both to one dtype and device"
            )


def check_floats(**given: Tensor) -> None:
    """Raise LayoutError unless all are floating-point tensors on one device."""
    first: tuple[str, torch.device] | None = None
    for name, value in given.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise LayoutError(f"{name} must be a floating-point tensor, got {described(value)}")
        if first is None:
            first = name, value.device
        elif value.device != first[1]:
            raise LayoutError(
                f"{name} is on {value.device} but {first[0]} is on {first[1]}; move both to one "
                "device"
            )


def check_beside(x: Tensor, **given: Tensor | None) -> None:
    """Raise LayoutError unless all are tensors on the device of ``x``; None is left out."""
    for name, value in given.items():
        if value is None:
            continue
        check_kind(Tensor, **{name: value})
        if value.device != x.device:
            raise LayoutError(
                f"{name} is on {value.device}, the input on {x.device}; move it there"
            )


def check_count(name: str, given: int, expected: int) -> None:
    """Raise LayoutError unless an argument that the layout determines is what it says."""
    if given != expected:
        raise LayoutError(f"{name} must be {expected}, as the layout has it, got {given}")


def check_name(argument: str, given: str, names: Sequence[str]) -> None:
    """Raise LayoutError unless ``given`` is one of ``names``."""
    if not isinstance(given, str) or given not in names:
        raise LayoutError(f"{argument} must be one of {list(names)}, got {given!r}")


def check_like(name: str, given: Tensor, x: Tensor, features: int) -> None:
    """Raise LayoutError unless ``given`` has ``features`` for every row of ``x``."""
    expected = (*x.shape[:-1], features)
    if tuple(given.shape) != expected or given.dtype != x.dtype or given.device != x.device:
        raise LayoutError(
            f"{name} must be {expected}, {x.dtype} on {x.device}, got {tuple(given.shape)} "
            f"{given.dtype} on {given.device}"
        )


def check_exactly(
    name: str, given: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise LayoutError unless ``given`` is what a kernel reads by address: also contiguous."""
    fits = tuple(given.shape) == tuple(shape) and given.dtype == dtype and given.device == device
    if not fits or given.layout != torch.strided or not given.is_contiguous():
        raise LayoutError(
            f"{name} must be {tuple(shape)}, {dtype} on {device}, and contiguous; got "
            f"{tuple(given.shape)} {given.dtype} on {given.device}"
        )


def refuse_sharded(x: Tensor | None, *parameters: Tensor | None) -> None:
    """Raise BackendError if a parameter is a DTensor and ``x`` is none."""
    if is_sharded(x):
        return  # the user's own sharding strategies may know the op
    for parameter in parameters:
        if is_sharded(parameter):
            raise BackendError(
                "the parameters are DTensors and the input is none: fully_shard gathers them "
                "while the module that it was given is called. Call that module, or a method of "
                "it that is registered: torch.distributed.fsdp.register_fsdp_forward_method("
                "module, 'gem_loss')"
            )


def is_sharded(tensor: Tensor | None) -> bool:
    """Is it a DTensor?"""
    # By name: most programs have no need of torch.distributed.tensor, and have not imported it.
    return type(tensor).__module__.startswith("torch.distributed.tensor")
