"""The loss of a batch that several processes share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from maskmoe_kernels.experiments.shared.ranks import Ranks
from maskmoe_kernels.experiments.skip.data.features import SessionBatch
from maskmoe_kernels.experiments.skip.settings import Settings
from maskmoe_kernels.models.sessions import SessionExperts, SessionModel
from maskmoe_kernels.ops.selection import deselection, gem_loss, selection

_WEIGHTS: dict[str, Callable[..., Tensor]] = {
    "selection": selection,
    "deselection": deselection,
    "uniform": lambda logits, *_: torch.ones_like(logits),
}


def loss_part(
    model: SessionModel, logits: Tensor, batch: SessionBatch, settings: Settings, ranks: Ranks
) -> Tensor:
    """This process's part of the loss; the mean of all parts is the loss of the whole batch.

    The loss is a sum over the tracks of all processes, divided by their number, or by the sum of
    their weights. Each process can divide only by its own share of the divisor, so it scales its
    part by ``world * own share / sum of the shares``.

    Args:
        model: From :func:`build`.
        logits: From :func:`logits_of`, for this process's share of the batch.
        batch: This process's share of the batch.
        settings: What the model was built from.
        ranks: The processes.
    Returns:
        A scalar.
    """
    real = ~batch.second_padding
    divisor = real.sum().to(logits.dtype)
    if not isinstance(model, SessionExperts):
        each = F.binary_cross_entropy_with_logits(logits, batch.target, reduction="none")
        loss = each.masked_fill(batch.second_padding, 0).sum() / divisor.clamp(min=1)
    else:
        options = model.family, settings.confidence
        normalize = None if settings.normalize == "none" else settings.normalize
        loss = gem_loss(
            logits, batch.target, *options, settings.weighting, normalize, real, settings.sharpness
        )
        if normalize == "batch" and ranks.world > 1:
            weigh = _WEIGHTS[settings.weighting]
            weights = weigh(logits.detach(), *options, settings.sharpness)
            divisor = weights.masked_fill(batch.second_padding.unsqueeze(-1), 0).sum()
    if ranks.world == 1:
        return loss
    return loss * (ranks.world * divisor / ranks.sum(divisor).clamp(min=1e-12))
