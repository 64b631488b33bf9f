"""Selection, mixture and loss as registered ops: schemas, checks of what comes in, fakes.

Their one implementation is Triton's; what it does not take is PyTorch's, in ``torch_impl``, and is
no op. ``ops/dispatch.py`` decides. The family is its tables: see :func:`tables.table`.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.ops.checks import check_exactly, check_name
from maskmoe_kernels.ops.triton_support.limits import CONFIDENCES, DTYPES, MAX_EXPERTS

WEIGHTINGS = ("selection", "deselection", "uniform")
NORMALIZATIONS = ("none", "sample", "expert", "batch")

_LIBRARY = torch.library.Library("maskmoe", "FRAGMENT")
_FORWARD = (
    "Tensor subset_experts, Tensor supersets_of, Tensor has_superset, str confidence, "
    "float sharpness"
)
_SCHEMAS = (
    f"selection(Tensor logits, {_FORWARD}, bool keep) -> (Tensor, Tensor)",
    "selection_backward(Tensor? grad_alpha, Tensor? grad_product, Tensor logits, Tensor alpha, "
    "Tensor product, Tensor superset_experts, Tensor subsets_of, Tensor has_superset, "
    "str confidence, float sharpness) -> Tensor",
    f"mixture(Tensor logits, {_FORWARD}) -> (Tensor, Tensor, Tensor)",
    f"gem_loss(Tensor logits, Tensor target, Tensor? mask, Tensor? sample_weight, {_FORWARD}, "
    "str weighting, str normalize) -> (Tensor, Tensor)",
)
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


# A program that was loaded brings tables of its own, and kernels read by address: so type, shape
# and device of each are checked here. The kernels themselves clamp the experts that a table names.
def _check(
    logits: Tensor,
    listed: Tensor,
    of: Tensor,
    has_superset: Tensor,
    confidence: str,
    sharpness: float,
) -> None:
    if logits.dtype not in DTYPES or logits.layout != torch.strided or not logits.dim():
        raise LayoutError(f"logits must be (*, H) in one of {DTYPES}, got {logits.dtype}")
    experts, device = logits.shape[-1], logits.device
    if not 0 < experts <= MAX_EXPERTS or listed.dim() != 1:
        raise LayoutError(
            f"there must be 1 to {MAX_EXPERTS} experts and a list of some, got {experts} and "
            f"{tuple(listed.shape)}"
        )
    check_exactly("subset_experts and superset_experts", listed, listed.shape, torch.int32, device)
    check_exactly("supersets_of and subsets_of", of, (len(listed), experts), torch.uint8, device)
    check_exactly("has_superset", has_superset, (experts,), torch.bool, device)
    check_name("confidence", confidence, CONFIDENCES)
    if not 1e-6 <= sharpness <= 1e6:
        raise LayoutError(f"sharpness must be a number from 1e-6 to 1e6, got {sharpness!r}")


@cache
def _kernels(name: str) -> Any:
    # Importing Triton takes as long as importing torch: when a kernel is first called, not before.
    return importlib.import_module(f"maskmoe_kernels.ops.selection.triton.{name}")


def _selection(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    _check(logits, *args[:5])
    result: tuple[Tensor, Tensor] = _kernels("selection_kernels").forward(logits, *args)
    return result


def _selection_backward(
    grad_alpha: Tensor | None, grad_product: Tensor | None, logits: Tensor, *args: Any
) -> Tensor:
    _check(logits, *args[2:])
    shape, device = logits.shape, logits.device
    for name, kept in zip(("alpha", "product"), args[:2], strict=True):
        check_exactly(name, kept, shape, torch.float32, device)
    for name, grad in (("grad_alpha", grad_alpha), ("grad_product", grad_product)):
        if grad is not None:
            check_exactly(name, grad.contiguous(), shape, torch.float32, device)
    result: Tensor = _kernels("selection_kernels").backward(grad_alpha, grad_product, logits, *args)
    return result


def _mixture(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check(logits, *args)
    result: tuple[Tensor, Tensor, Tensor] = _kernels("selection_kernels").mixture(logits, *args)
    return result


def _gem_loss(
    logits: Tensor, target: Tensor, mask: Tensor | None, sample_weight: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    *selection, weighting, normalize = args
    _check(logits, *selection)
    check_name("weighting", weighting, WEIGHTINGS)
    check_name("normalize", normalize, NORMALIZATIONS)
    rows, device = (logits.numel() // logits.shape[-1],), logits.device
    check_exactly("target", target.reshape(-1).float(), rows, torch.float32, device)
    if mask is not None:
        check_exactly("mask", mask.reshape(-1).contiguous(), rows, torch.bool, device)
    if sample_weight is not None:
        flat = sample_weight.reshape(-1).contiguous()
        check_exactly("sample_weight", flat, rows, torch.float32, device)
    result: tuple[Tensor, Tensor] = _kernels("gem_kernels").gem_loss(
        logits, target, mask, sample_weight, *args
    )
    return result


def _selection_fake(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    alpha = logits.new_empty(logits.shape, dtype=torch.float32)
    return alpha, torch.empty_like(alpha) if args[-1] else alpha.new_empty(0)


def _selection_backward_fake(
    grad_alpha: Tensor | None, grad_product: Tensor | None, logits: Tensor, *args: Any
) -> Tensor:
    return logits.new_empty(logits.shape)


def _mixture_fake(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    alpha = logits.new_empty(logits.shape, dtype=torch.float32)
    return alpha.new_empty(logits.shape[:-1]), alpha, torch.empty_like(alpha)


def _gem_loss_fake(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    grad = logits.new_empty(logits.shape, dtype=torch.float32)
    return grad.new_empty(()), grad


for _name, _run, _fake in (
    ("selection", _selection, _selection_fake),
    ("selection_backward", _selection_backward, _selection_backward_fake),
    ("mixture", _mixture, _mixture_fake),
    ("gem_loss", _gem_loss, _gem_loss_fake),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake("maskmoe::" + _name, _fake, lib=_LIBRARY)
