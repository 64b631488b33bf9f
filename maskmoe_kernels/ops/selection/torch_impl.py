"""Selection, mixture and loss in plain PyTorch: any dtype, any confidence, every transform.

Everything is computed from the logits, ``(*, H)``, or ``(*, H, K)`` where an expert has K
``outputs``, the classes of a softmax.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskmoe_kernels._compat import without_autocast
from maskmoe_kernels.layout.subsets import SubsetFamily
from maskmoe_kernels.ops.selection.confidence import (
    LOG_FLOOR,
    Confidence,
    confidence_of,
    sharpened,
    unknown_logits,
)


def selection(
    logits: Tensor,
    family: SubsetFamily,
    confidence: Confidence,
    sharpness: float,
    outputs: int | None = None,
) -> Tensor:
    """alpha, ``(*, H)``; see :func:`maskmoe_kernels.selection`."""
    own, product, unknown, reached = _parts(logits, family, confidence, sharpness, outputs)
    return (own * product).masked_fill(unknown | reached, torch.nan)


def deselection(
    logits: Tensor,
    family: SubsetFamily,
    confidence: Confidence,
    sharpness: float,
    outputs: int | None = None,
) -> Tensor:
    """prod over j in omega(i) of (1 - g_j), ``(*, H)``."""
    _, product, _, reached = _parts(logits, family, confidence, sharpness, outputs)
    return product.masked_fill(reached, torch.nan)


def mixture(
    logits: Tensor,
    family: SubsetFamily,
    confidence: Confidence,
    sharpness: float,
    alpha: Tensor | None,
    outputs: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Probability ``(*,)`` or ``(*, K)``, alpha and attribution ``(*, H)``.

    Args:
        logits: z, ``(*, H)``.
        family: The subsets of the H experts.
        confidence: See :func:`selection`.
        sharpness: See :func:`selection`.
        alpha: That of :func:`selection`. ``None``: experts whose logit is NaN are left out, and
            alpha is that of the family of the others.
        outputs: See :func:`selection`.
    """
    if alpha is None:
        alpha, known = _selection_of_known(logits, family, confidence, sharpness, outputs)
        logits = logits.masked_fill(~(known if outputs is None else known.unsqueeze(-1)), 0)
        equal: Tensor | float = known / known.sum(-1, keepdim=True)
    else:
        equal = 1 / family.num_experts
    total = alpha.sum(-1, keepdim=True)
    nobody = total == 0
    share = torch.where(nobody, equal, alpha / total.masked_fill(nobody, 1))
    z = logits.to(alpha.dtype)
    if outputs is None:
        mixed = (share * torch.sigmoid(2 * z)).sum(-1)
    else:
        mixed = (share.unsqueeze(-1) * z.softmax(-1)).sum(-2)
    return mixed.clamp(max=1), alpha, share  # shares may sum to 1 and a rounding


def gem_loss(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    family: SubsetFamily,
    confidence: Confidence,
    sharpness: float,
    weighting: str,
    normalize: str | None,
    sample_weight: Tensor | None,
    outputs: int | None = None,
) -> Tensor:
    """The loss, ``()``; see :func:`maskmoe_kernels.gem_loss`.

    ``sample_weight`` has the mean 1 over the samples of ``mask``, as :func:`weighted` makes it.
    """
    z, y = _kept(logits, target, mask)
    losses = expert_losses(z, y, "binary" if outputs is None else "multiclass", outputs)
    with torch.no_grad():  # E-step: the old parameters (eq. 4)
        if weighting == "uniform":
            weight = torch.ones_like(losses)
        else:
            weigh = selection if weighting == "selection" else deselection
            weight = weigh(z, family, confidence, sharpness, outputs)
    return (_normalized(weight, normalize, mask, sample_weight) * losses).sum()


def expert_loss(
    predictions: Tensor,
    target: Tensor,
    kind: str,
    outputs: int | None,
    mask: Tensor | None,
    sample_weight: Tensor | None,
) -> Tensor:
    """The loss, ``()``; see :func:`maskmoe_kernels.expert_loss`, and above for the weights."""
    z, y = _kept(predictions, target, mask)
    losses = expert_losses(z, y, kind, outputs)
    return (_normalized(torch.ones_like(losses), None, mask, sample_weight) * losses).sum()


def expert_losses(z: Tensor, target: Tensor, kind: str, outputs: int | None) -> Tensor:
    """Loss of every expert in every sample, ``(*, H)``; ``z`` is ``(*, H)`` or ``(*, H, K)``."""
    if kind == "multiclass":
        index = target.long()[..., None, None].expand(*z.shape[:-1], 1)
        return -z.log_softmax(-1).gather(-1, index).squeeze(-1)
    if kind == "regression":
        errors = (z - target.to(z.dtype).unsqueeze(-1 if outputs is None else -2)).square()
        return errors if outputs is None else errors.sum(-1)
    # (tanh z + 1) / 2 = sigmoid(2 z): the logit form keeps its gradient at saturation.
    y = target.to(z.dtype).unsqueeze(-1).expand_as(z)
    return F.binary_cross_entropy_with_logits(2 * z, y, reduction="none")


def _kept(logits: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits in float32 (float64 stays) and targets; 0 in samples that do not count."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    if mask is None:
        return z, target
    out = ~mask
    shape = mask.shape + (1,) * (z.dim() - mask.dim())
    of_target = mask.shape + (1,) * (target.dim() - mask.dim())
    return z.masked_fill(out.reshape(shape), 0), target.masked_fill(out.reshape(of_target), 0)


def _selection_of_known(
    logits: Tensor,
    family: SubsetFamily,
    confidence: Confidence,
    sharpness: float,
    outputs: int | None,
) -> tuple[Tensor, Tensor]:
    """alpha in the family of the experts whose logit is known (not NaN), and who is; ``(*, H)``.

    It is 0 for experts that are unknown, and NaN where all are.
    """
    own, product, unknown, _ = _parts(logits, family, confidence, sharpness, outputs, of_known=True)
    return (own * product).masked_fill(unknown.all(-1, keepdim=True), torch.nan), ~unknown


def _parts(
    logits: Tensor,
    family: SubsetFamily,
    confidence: Confidence,
    sharpness: float,
    outputs: int | None,
    of_known: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g_i, prod over omega(i) of (1 - g_j), is g_i unknown, is a factor unknown; ``(*, H)`` each.

    What is unknown (NaN) is set aside and put in at the end: a product with 0 would let it
    through to experts outside its subset, and so would the derivative of one. With ``of_known``,
    an expert is sharpened if a superset of its subset is that of a known expert.
    """
    with without_autocast(logits.device):
        z = logits if logits.dtype == torch.float64 else logits.float()
        unknown = unknown_logits(z, outputs)
        safe = z.masked_fill(unknown if outputs is None else unknown.unsqueeze(-1), 0)
        g, log_rest = confidence_of(safe, confidence, outputs)
        unknown = unknown | g.isnan()
        if sharpness != 1:
            sharp, sharp_rest = sharpened(g, log_rest, sharpness)
            if of_known:
                has_larger = (~unknown).double() @ family.table("strict", z.device) > 0
            else:
                has_larger = family.table("has_larger", z.device)
            g = torch.where(has_larger, sharp, g)
            log_rest = torch.where(has_larger, sharp_rest, log_rest)
        subsets = family.table("strict", z.device).T  # column i: the proper subsets of S_i
        terms = log_rest.masked_fill(unknown, 0).clamp(min=LOG_FLOOR).double()
        product = (terms @ subsets).exp().to(g.dtype)
        reached = unknown.double() @ subsets > 0
        return g.masked_fill(unknown, 0), product, unknown, reached


def _normalized(
    weight: Tensor, normalize: str | None, mask: Tensor | None, sample_weight: Tensor | None
) -> Tensor:
    """Weights whose sum of products with the cross-entropies is the loss."""
    if mask is not None:
        weight = weight.masked_fill(~mask.unsqueeze(-1), 0)
    if normalize == "sample":
        weight = _divide(weight, weight.sum(-1, keepdim=True))
    if sample_weight is not None:
        weight = weight * sample_weight.to(weight.dtype).unsqueeze(-1)
    if normalize == "batch":
        return _divide(weight, weight.sum())
    if normalize == "expert":
        return _divide(weight, weight.reshape(-1, weight.shape[-1]).sum(0))
    if mask is None:
        return weight / max(weight[..., 0].numel(), 1)
    return weight / mask.sum().clamp(min=1)


def _divide(weight: Tensor, total: Tensor) -> Tensor:
    return weight / total.masked_fill(total == 0, 1)
