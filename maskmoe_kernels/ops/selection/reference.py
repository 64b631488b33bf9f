"""The definition of selection, mixture and loss, in float64 (section 3.3).

Plain formulas, one beside the other, on ``(*, H)`` tensors; autograd derives the gradients. Nothing
is shared with the implementations that are judged by it. 1 - g is written as it reads, so it has
no digits left where a confidence is within 1e-16 of 1; implementations keep them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from maskmoe_kernels.layout.subsets import SubsetFamily

Confidence = str | Callable[[Tensor], Tensor]


def confidence_reference(logits: Tensor, confidence: Confidence) -> Tensor:
    """g of each logit z, with F = tanh(z), and p = sigmoid(2z) for ``"rare"``; float64."""
    z = logits.double()
    if callable(confidence):
        return confidence(z).double().clamp(0, 1)
    size = torch.tanh(z).abs()
    rare = (torch.sigmoid(2 * z) - 0.3).abs()
    return {
        "abs": size,
        "square": size**2,
        "smooth": 2 * size**4 / (1 + size**3),
        "rare": rare**4 / (1 + rare**3) * (1 + 0.7**3) / 0.7**4,
    }[confidence]


def selection_reference(
    logits: Tensor,
    family: SubsetFamily,
    confidence: Confidence = "abs",
    sharpness: float = 1.0,
    own: bool = True,
) -> Tensor:
    """alpha_i = g_i * prod over the proper subsets j of S_i of (1 - g_j), ``(*, H)`` float64.

    The confidence of an expert that has a superset is raised to ``sharpness`` first. Without
    ``own``, the product alone (deselection).
    """
    is_superset = family.strict.to(logits.device)  # entry (i, j): is S_j a proper subset of S_i?
    g = confidence_reference(logits, confidence)
    g = torch.where(is_superset.any(0), g**sharpness, g)
    # A factor of 1 where j is no subset of i, whatever 1 - g_j is.
    factors = torch.where(is_superset, (1 - g).unsqueeze(-2), 1.0)
    product = factors.prod(-1)
    return g * product if own else product


def mixture_reference(
    logits: Tensor,
    family: SubsetFamily,
    confidence: Confidence = "abs",
    sharpness: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """f = sum_i alpha_i f^i / sum_i alpha_i with f^i = sigmoid(2 z_i) (eq. 1, eq. 5).

    Returns:
        f ``(*,)``, alpha and alpha_i / sum of alpha ``(*, H)``, float64. Where no expert has any
        confidence, the experts count alike.
    """
    alpha = selection_reference(logits, family, confidence, sharpness)
    total = alpha.sum(-1, keepdim=True)
    share = torch.where(total == 0, 1 / family.num_experts, alpha / total)
    return (share * torch.sigmoid(2 * logits.double())).sum(-1), alpha, share


def gem_loss_reference(
    logits: Tensor,
    target: Tensor,
    family: SubsetFamily,
    confidence: Confidence = "abs",
    weighting: str = "selection",
    normalize: str | None = None,
    mask: Tensor | None = None,
    sharpness: float = 1.0,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """mean over samples of sum_i w_i BCE(y, f^i), w detached (eq. 4, eq. 7); ``()`` float64.

    Samples that ``mask`` leaves out, or whose ``sample_weight`` is 0, are taken out of the batch; a
    weight of 2 counts a sample twice. See :func:`maskmoe_kernels.gem_loss` for what ``normalize``
    divides the weights by; weights whose sum is 0 stay 0.
    """
    z, y = logits.double().reshape(-1, family.num_experts), target.double().reshape(-1, 1)
    times = torch.ones_like(y) if sample_weight is None else sample_weight.double().reshape(-1, 1)
    counts = torch.ones_like(y, dtype=torch.bool) if mask is None else mask.reshape(-1, 1)
    kept = (counts & (times != 0)).squeeze(1)
    z, y, times = z[kept], y[kept], times[kept]
    if weighting == "uniform":
        weight = torch.ones_like(z).detach()
    else:
        own = weighting == "selection"
        weight = selection_reference(z.detach(), family, confidence, sharpness, own)
    if normalize == "sample":
        weight = _divided(weight, weight.sum(1, keepdim=True))
    weight = times * weight
    over = {"expert": weight.sum(0), "batch": weight.sum()}.get(str(normalize), times.sum())
    return (_divided(weight, over) * -_log_likelihood(z, y)).sum()


def _divided(weight: Tensor, total: Tensor) -> Tensor:
    return torch.where(total == 0, 0.0, weight / total)


def _log_likelihood(z: Tensor, y: Tensor) -> Tensor:
    """y log f + (1 - y) log(1 - f) with f = sigmoid(2z)."""
    log_f, log_rest = (torch.nn.functional.logsigmoid(sign * 2 * z) for sign in (1, -1))
    return y * log_f + (1 - y) * log_rest
