"""The fused objectives as registered ops: selection, mixture and the loss, on Triton's kernels.

What they take is said by :func:`obstacle`; all else is PyTorch's, in ``objectives``, and gives the
same numbers. ``selection`` has a fused backward; ``mixture`` is fused where nothing asks for its
gradient and composed from ``selection`` where something does; the weights of ``gem_loss`` carry no
gradient (eq. 4), so its backward is one product.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from maskmoe_kernels._compat import constant_in_trace, transformed
from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.subsets import SubsetFamily
from maskmoe_kernels.ops import triton_support as backend
from maskmoe_kernels.ops.checks import check_exactly, check_name
from maskmoe_kernels.ops.masked_linear.autograd import differentiable_once
from maskmoe_kernels.ops.triton_support.limits import CONFIDENCES, DTYPES, MAX_EXPERTS

#: Devices whose tensors go to the kernels unasked. (Tests of the interpreter add the CPU.)
DEVICES = {"cuda"}

_ONCE = (
    "the fused objectives cannot be differentiated twice; pass float64 logits or a confidence of "
    "your own, which go through PyTorch"
)
_LIBRARY = torch.library.Library("maskmoe", "FRAGMENT")
_FORWARD = "Tensor smaller, Tensor above, Tensor larger, str confidence, float sharpness"
_SCHEMAS = (
    f"selection(Tensor logits, {_FORWARD}, bool keep) -> (Tensor, Tensor)",
    "selection_backward(Tensor? grad_alpha, Tensor? grad_product, Tensor logits, Tensor alpha, "
    "Tensor product, Tensor bigger, Tensor below, Tensor larger, str confidence, float sharpness) "
    "-> Tensor",
    f"mixture(Tensor logits, {_FORWARD}) -> (Tensor, Tensor, Tensor)",
    f"gem_loss(Tensor logits, Tensor target, Tensor? mask, {_FORWARD}, str weighting, "
    "str normalize) -> (Tensor, Tensor)",
)
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


# What a kernel reads by address is checked here: a program that was loaded brings its own tables.
# The values in them are for the kernels, which stay inside the experts whatever a table names.
def _check(
    logits: Tensor, listed: Tensor, of: Tensor, larger: Tensor, confidence: str, sharpness: float
) -> None:
    if logits.dtype not in DTYPES or logits.layout != torch.strided or not logits.dim():
        raise LayoutError(f"logits must be (*, H) in one of {DTYPES}, got {logits.dtype}")
    experts, device = logits.shape[-1], logits.device
    if not 0 < experts <= MAX_EXPERTS or listed.dim() != 1:
        raise LayoutError(
            f"there must be 1 to {MAX_EXPERTS} experts and a list of some, got {experts} and "
            f"{tuple(listed.shape)}"
        )
    check_exactly("smaller and bigger", listed, listed.shape, torch.int32, device)
    check_exactly("above and below", of, (len(listed), experts), torch.uint8, device)
    check_exactly("larger", larger, (experts,), torch.bool, device)
    check_name("confidence", confidence, CONFIDENCES)
    if not 1e-6 <= sharpness <= 1e6:
        raise LayoutError(f"sharpness must be a number from 1e-6 to 1e6, got {sharpness!r}")


# Triton is imported when a kernel is first called, not before.
def _selection(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    from maskmoe_kernels.ops.selection.triton import selection_kernels

    _check(logits, *args[:5])
    return selection_kernels.forward(logits, *args)


def _selection_backward(
    grad_alpha: Tensor | None, grad_product: Tensor | None, logits: Tensor, *args: Any
) -> Tensor:
    from maskmoe_kernels.ops.selection.triton import selection_kernels

    _check(logits, *args[2:])
    shape, device = logits.shape, logits.device
    for name, kept in zip(("alpha", "product"), args[:2], strict=True):
        check_exactly(name, kept, shape, torch.float32, device)
    for name, grad in (("grad_alpha", grad_alpha), ("grad_product", grad_product)):
        if grad is not None:
            check_exactly(name, grad.contiguous(), shape, torch.float32, device)
    return selection_kernels.backward(grad_alpha, grad_product, logits, *args)


def _mixture(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from maskmoe_kernels.ops.selection.triton import selection_kernels

    _check(logits, *args)
    return selection_kernels.mixture(logits, *args)


def _gem_loss(
    logits: Tensor, target: Tensor, mask: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    from maskmoe_kernels.ops.selection.triton import gem_kernels

    *selection, weighting, normalize = args
    _check(logits, *selection)
    check_name("weighting", weighting, ("selection", "deselection"))
    check_name("normalize", normalize, ("none", "sample", "expert", "batch"))
    rows, device = (logits.numel() // logits.shape[-1],), logits.device
    check_exactly("target", target.reshape(-1).float(), rows, torch.float32, device)
    if mask is not None:
        check_exactly("mask", mask.reshape(-1).contiguous(), rows, torch.bool, device)
    return gem_kernels.gem_loss(logits, target, mask, *args)


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


def obstacle(logits: Tensor, confidence: Any) -> str | None:
    """Why the fused ops do not take these logits, in words for the user; None when they do."""
    if logits.device.type not in DEVICES:
        return f"the logits are on {logits.device}; these kernels are for NVIDIA GPUs"
    if logits.dtype not in DTYPES:
        return f"the logits are {logits.dtype}; these kernels compute in float32"
    if logits.shape[-1] > MAX_EXPERTS:
        return f"there are {logits.shape[-1]} experts; these kernels hold up to {MAX_EXPERTS}"
    if not isinstance(confidence, str) or confidence not in CONFIDENCES:
        return "the confidence is a function; these kernels know those that have a name"
    if transformed():
        return "torch.func transforms and forward-mode AD go through PyTorch"
    return _device_obstacle(logits.device)


@constant_in_trace
def _device_obstacle(device: torch.device) -> str | None:
    return backend.unsupported_reason(device)


@constant_in_trace
def _keep_tables(family: SubsetFamily, device: torch.device) -> None:
    # The trace then finds the tables as it finds any other.
    for name in ("smaller", "above", "bigger", "below", "larger"):
        family.caches.table(f"fused {name}", device, partial(_build, family, name))


def table(family: SubsetFamily, name: str, device: torch.device) -> Tensor:
    """A table of ``family`` for the kernels, built once per device.

    ``"smaller"`` and ``"bigger"``: the experts inside another one's subset, and those with a
    subset inside theirs, int32. ``"above"`` and ``"below"``: for each of these, which experts
    are above (below) it, ``(count, H)`` uint8. ``"larger"``: ``family.has_larger``.
    """
    _keep_tables(family, device)
    return family.caches.tables[f"fused {name}", device]


def _build(family: SubsetFamily, name: str) -> Tensor:
    strict = family.strict
    if name == "larger":
        return family.has_larger
    if name in ("smaller", "above"):
        strict = strict.T
    listed = strict.any(1)
    if name in ("above", "below"):
        return strict[listed].to(torch.uint8).contiguous()
    return listed.nonzero().flatten().to(torch.int32)


def selection(
    logits: Tensor, family: SubsetFamily, confidence: str, sharpness: float, *, own: bool
) -> Tensor:
    """alpha with ``own``, else the products over omega(i): ``(*, H)`` float32, differentiable."""
    tables = _tables(family, logits.device)
    if torch.is_grad_enabled() and logits.requires_grad:
        device = logits.device
        below = table(family, "bigger", device), table(family, "below", device)
        apply: Any = _Selection.apply
        both = apply(logits, *tables, *below, confidence, float(sharpness))
    else:
        both = torch.ops.maskmoe.selection(logits, *tables, confidence, float(sharpness), not own)
    result: Tensor = both[0 if own else 1]
    return result


def mixture(
    logits: Tensor, family: SubsetFamily, confidence: str, sharpness: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Probability, alpha and attribution, float32; it has no derivative."""
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.maskmoe.mixture(
        logits, *_tables(family, logits.device), confidence, float(sharpness)
    )
    return result


def gem_loss(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    family: SubsetFamily,
    confidence: str,
    sharpness: float,
    weighting: str,
    normalize: str | None,
) -> Tensor:
    """The loss, ``()`` float32, differentiable in the logits."""
    tables = _tables(family, logits.device)
    options = (confidence, float(sharpness), weighting, normalize or "none")
    if torch.is_grad_enabled() and logits.requires_grad:
        apply: Any = _GemLoss.apply
        loss: Tensor = apply(logits, target, mask, *tables, *options)
    else:
        loss = torch.ops.maskmoe.gem_loss(logits, target, mask, *tables, *options)[0]
    return loss


def _tables(family: SubsetFamily, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return (
        table(family, "smaller", device),
        table(family, "above", device),
        table(family, "larger", device),
    )


class _Selection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        smaller: Tensor,
        above: Tensor,
        larger: Tensor,
        bigger: Tensor,
        below: Tensor,
        confidence: str,
        sharpness: float,
    ) -> tuple[Tensor, Tensor]:
        alpha: Tensor
        product: Tensor
        alpha, product = torch.ops.maskmoe.selection(
            logits, smaller, above, larger, confidence, sharpness, True
        )
        ctx.save_for_backward(logits, alpha, product, bigger, below, larger)
        ctx.options = confidence, sharpness
        ctx.set_materialize_grads(False)
        return alpha, product

    @staticmethod
    def backward(
        ctx: Any, grad_alpha: Tensor | None, grad_product: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits = ctx.saved_tensors[0]
        graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with torch.no_grad() if graph else nullcontext():
            grad = torch.ops.maskmoe.selection_backward(
                grad_alpha, grad_product, *ctx.saved_tensors, *ctx.options
            )
        if graph:
            grad = differentiable_once(grad, _ONCE, grad_alpha, grad_product, logits)
        return grad, None, None, None, None, None, None, None


class _GemLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        mask: Tensor | None,
        smaller: Tensor,
        above: Tensor,
        larger: Tensor,
        *options: Any,
    ) -> Tensor:
        loss: Tensor
        loss, grad = torch.ops.maskmoe.gem_loss(
            logits, target, mask, smaller, above, larger, *options
        )
        ctx.save_for_backward(logits, grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        logits, of_one = ctx.saved_tensors
        graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with torch.no_grad() if graph else nullcontext():
            grad = torch.empty_like(of_one, dtype=logits.dtype)
            torch.mul(of_one, grad_loss, out=grad)  # rounds once, also to 16 bits
        if graph:
            grad = differentiable_once(grad, _ONCE, grad_loss, logits)
        return (grad, *[None] * 9)
