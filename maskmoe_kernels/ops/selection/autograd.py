"""The registered ops with their gradients.

``selection`` has a fused backward. ``mixture`` has none: where a gradient is asked for, it is
composed from ``selection``. The weights of ``gem_loss`` carry no gradient (eq. 4), so the forward
makes the gradient of its logits, and backward is one product.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from maskmoe_kernels._compat import is_batched
from maskmoe_kernels.layout.subsets import SubsetFamily
from maskmoe_kernels.ops.masked_linear.autograd import differentiable_once
from maskmoe_kernels.ops.selection.tables import table

_ONCE = (
    "the fused objectives cannot be differentiated twice; pass float64 logits or a confidence of "
    "your own, which go through PyTorch"
)


def selection(
    logits: Tensor, family: SubsetFamily, confidence: str, sharpness: float, *, own: bool
) -> Tensor:
    """alpha with ``own``, else the products over omega(i): ``(*, H)`` float32, differentiable."""
    tables = _tables(family, logits.device)
    if torch.is_grad_enabled() and logits.requires_grad:
        device = logits.device
        subsets_of = table(family, "superset_experts", device), table(family, "subsets_of", device)
        apply: Any = _Selection.apply
        both = apply(logits, *tables, *subsets_of, confidence, float(sharpness))
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
    confidence: Any,
    sharpness: float,
    weighting: str,
    normalize: str | None,
    sample_weight: Tensor | None,
) -> Tensor:
    """The loss, ``()`` float32, differentiable in the logits; weights of mean 1."""
    tables = _tables(family, logits.device)
    options = (confidence, float(sharpness), weighting, normalize or "none")
    sample_weight = None if sample_weight is None else sample_weight.float()
    if torch.is_grad_enabled() and logits.requires_grad:
        apply: Any = _GemLoss.apply
        loss: Tensor = apply(logits, target, mask, sample_weight, *tables, *options)
    else:
        loss = torch.ops.maskmoe.gem_loss(logits, target, mask, sample_weight, *tables, *options)[0]
    return loss


def _tables(family: SubsetFamily, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return (
        table(family, "subset_experts", device),
        table(family, "supersets_of", device),
        table(family, "has_superset", device),
    )


class _Selection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        subset_experts: Tensor,
        supersets_of: Tensor,
        has_superset: Tensor,
        superset_experts: Tensor,
        subsets_of: Tensor,
        confidence: str,
        sharpness: float,
    ) -> tuple[Tensor, Tensor]:
        alpha: Tensor
        product: Tensor
        alpha, product = torch.ops.maskmoe.selection(
            logits, subset_experts, supersets_of, has_superset, confidence, sharpness, True
        )
        ctx.save_for_backward(logits, alpha, product, superset_experts, subsets_of, has_superset)
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
        *arguments: Any,
    ) -> Tensor:
        loss: Tensor
        loss, grad = torch.ops.maskmoe.gem_loss(logits, target, *arguments)
        ctx.save_for_backward(logits, grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        logits, of_one = ctx.saved_tensors
        graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with torch.no_grad() if graph else nullcontext():
            if is_batched(grad_loss):
                grad = (of_one * grad_loss).to(logits.dtype)
            else:
                grad = torch.empty_like(of_one, dtype=logits.dtype)
                torch.mul(of_one, grad_loss, out=grad)  # rounds once, also to 16 bits
        if graph:
            grad = differentiable_once(grad, _ONCE, grad_loss, logits)
        return (grad, *[None] * 10)
