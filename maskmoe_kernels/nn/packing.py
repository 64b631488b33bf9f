"""Does a checkpoint's packed weight, mask or degrees belong to a layer's layout?"""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = 64


def packing_state(packing_id: int) -> Tensor:
    """The bits of a layout's ``packing_id`` as signs, ``(64,)`` float32.

    Users cast, average and scale whole state dicts. A sign survives that in every floating-point
    type; an integer does not.
    """
    signs = [1.0 if packing_id >> bit & 1 else -1.0 for bit in range(_BITS)]
    return torch.tensor(signs, dtype=torch.float32, device="cpu")


def packing_mismatch(state: Tensor | None, packing_id: int) -> str | None:
    """Why a checkpoint's state is not that of this packing, in words; None if it is.

    None also without a state, which torch itself reports as a missing key, and for a state on the
    meta device, where the weight has no values either.
    """
    if state is None or state.is_meta:
        return None
    found = state.detach().cpu()
    other = (
        "the checkpoint's packed weight belongs to another layout; save dense_weight() of the "
        "layer it came from and load that."
    )
    if found.numel() == 1:  # older checkpoints hold the number itself, exact in wide types only
        own = torch.tensor(packing_id, device="cpu").to(found.dtype)
        wide = found.dtype in (torch.int64, torch.float64, torch.float32)
        if wide and bool(found.reshape(()) == own):
            return None
        if found.dtype == torch.int64:
            return other
    elif tuple(found.shape) == (_BITS,) and bool((found.float().abs() > 0).all()):
        return None if torch.equal(found.float().sign(), packing_state(packing_id)) else other
    return (
        f"it cannot be read, {found.dtype} {tuple(found.shape)}; it says in which order the "
        "weight is packed, so copy it unchanged when you cast, average or rebuild a state dict."
    )


def mask_mismatch(mask: Tensor, own: Tensor) -> str | None:
    """Why a checkpoint's mask is not ``own``, ``(out, in)`` bool, in words; None if it is."""
    if mask.shape != own.shape:
        return f"the checkpoint's is {tuple(mask.shape)}, this layer's {tuple(own.shape)}."
    different = int((mask.to(own.device).bool() != own).sum())
    if different:
        return (
            f"the checkpoint's differs from this layer's in {different} of {own.numel()} "
            "entries; build the layer from the checkpoint's mask."
        )
    return None


def degrees_mismatch(degrees: Tensor, own: Tensor) -> str | None:
    """Why units of these degrees, ``(out,)``, do not have the mask ``own``; None if they can.

    A unit of MADE sees the inputs of lower degree. So a unit of higher degree sees all that one of
    lower degree sees, and units of the same degree see the same.
    """
    if degrees.shape != own.shape[:1]:
        return f"the checkpoint's is {tuple(degrees.shape)}, this layer has {len(own)} units."
    degrees = degrees.to(own.device)
    order = degrees.argsort(stable=True)
    before, after = own[order][:-1], own[order][1:]
    equal = degrees[order].diff() == 0
    if (before & ~after).any() or (before != after)[equal].any():
        return (
            "a unit of this layer sees more than one of a higher degree, or less than one of the "
            "same; build the layer from the checkpoint's mask."
        )
    return None
