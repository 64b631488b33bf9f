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


def confidence_reference(
    logits: Tensor, confidence: Confidence, outputs: int | None = None
) -> Tensor:
    """g of each logit z, with F = tanh(z), and p = sigmoid(2z) for ``"rare"``; float64.

    With K ``outputs`` an expert, logits are ``(*, H, K)``, p = softmax(z), and (K max p - 1) /
    (K - 1) is in the place of |F|.
    """
    z = logits.double()
    if callable(confidence):
        return confidence(z).double().clamp(0, 1)
    size = torch.tanh(z).abs()
    if outputs is not None:
        size = (outputs * z.softmax(-1).amax(-1) - 1) / (outputs - 1)
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
    outputs: int | None = None,
) -> Tensor:
    """alpha_i = g_i * prod over the proper subsets j of S_i of (1 - g_j), ``(*, H)`` float64.

    The confidence of an expert that has a superset is raised to ``sharpness`` first. Without
    ``own``, the product alone (deselection).
    """
    is_superset = family.strict.to(logits.device)  # entry (i, j): is S_j a proper subset of S_i?
    g = confidence_reference(logits, confidence, outputs)
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
    outputs: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """f = sum_i alpha_i f^i / sum_i alpha_i with f^i = sigmoid(2 z_i) (eq. 1, eq. 5).

    With K ``outputs``, f^i = softmax(z_i) and f is ``(*, K)``.

    Returns:
        f ``(*,)``, alpha and alpha_i / sum of alpha ``(*, H)``, float64. Where no expert has any
        confidence, the experts count alike.
    """
    alpha = selection_reference(logits, family, confidence, sharpness, outputs=outputs)
    total = alpha.sum(-1, keepdim=True)
    share = torch.where(total == 0, 1 / family.num_experts, alpha / total)
    if outputs is not None:
        return (share.unsqueeze(-1) * logits.double().softmax(-1)).sum(-2), alpha, share
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
    outputs: int | None = None,
) -> Tensor:
    """mean over samples of sum_i w_i BCE(y, f^i), w detached (eq. 4, eq. 7); ``()`` float64.

    With K ``outputs``, logits are ``(*, H, K)`` and the cross-entropy is that of class y.

    Samples that ``mask`` leaves out, or whose ``sample_weight`` is 0, are taken out of the batch; a
    weight of 2 counts a sample twice. See :func:`maskmoe_kernels.gem_loss` for what ``normalize``
    divides the weights by; weights whose sum is 0 stay 0.
    """
    experts = (family.num_experts,) if outputs is None else (family.num_experts, outputs)
    z, y, times = _kept(logits.reshape(-1, *experts), target.reshape(-1), mask, sample_weight)
    losses = _binary(z, y) if outputs is None else _multiclass(z, y)
    if weighting == "uniform":
        weight = torch.ones_like(losses).detach()
    else:
        own = weighting == "selection"
        weight = selection_reference(z.detach(), family, confidence, sharpness, own, outputs)
    if normalize == "sample":
        weight = _divided(weight, weight.sum(1, keepdim=True))
    weight = times * weight
    over = {"expert": weight.sum(0), "batch": weight.sum()}.get(str(normalize), times.sum())
    return (_divided(weight, over) * losses).sum()


def expert_loss_reference(
    predictions: Tensor,
    target: Tensor,
    kind: str = "binary",
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Mean over samples of the sum over experts of each one's own loss; ``()`` float64.

    The batch is one-dimensional: predictions ``(n, H)`` or ``(n, H, K)``, target ``(n,)`` or, for
    ``"regression"`` of K outputs, ``(n, K)``.
    """
    z, y, times = _kept(predictions, target, mask, sample_weight)
    losses = {"binary": _binary, "multiclass": _multiclass, "regression": _squared}[kind](z, y)
    return (_divided(times, times.sum()) * losses).sum()


def _kept(
    z: Tensor, y: Tensor, mask: Tensor | None, sample_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions, targets and weights ``(n, 1)`` of the samples that count."""
    times = torch.ones(len(z), 1).double() if sample_weight is None else sample_weight.double()
    times = times.reshape(-1, 1)
    kept = times.squeeze(1) != 0
    if mask is not None:
        kept = kept & mask.reshape(-1)
    return z.double()[kept], y[kept], times[kept]


def _binary(z: Tensor, y: Tensor) -> Tensor:
    """BCE of f = sigmoid(2z), of each expert: ``(n, H)``."""
    log_f, log_rest = (torch.nn.functional.logsigmoid(sign * 2 * z) for sign in (1, -1))
    y = y.double().unsqueeze(1)
    return -(y * log_f + (1 - y) * log_rest)


def _multiclass(z: Tensor, y: Tensor) -> Tensor:
    """-log of the y-th entry of softmax(z), of each expert: ``(n, H)``."""
    log_p = torch.log_softmax(z, -1)
    return -torch.stack([log_p[s, :, int(c)] for s, c in enumerate(y)]) if len(y) else z.sum(-1)


def _squared(z: Tensor, y: Tensor) -> Tensor:
    """The squared error, of each expert, summed over outputs: ``(n, H)``."""
    error = (z - y.double().unsqueeze(1)) ** 2
    return error if z.dim() == 2 else error.sum(-1)


def _divided(weight: Tensor, total: Tensor) -> Tensor:
    return torch.where(total == 0, 0.0, weight / total)
