"""The four models of skip prediction: how they are built, and how they predict."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.skip.data.columns import MSSD
from maskmoe_kernels.experiments.skip.data.features import SessionBatch
from maskmoe_kernels.experiments.skip.schema.schema import Schema
from maskmoe_kernels.experiments.skip.settings import PRECISIONS, TOLERANCE, Settings
from maskmoe_kernels.explain import sufficient
from maskmoe_kernels.layout.subsets import SubsetFamily
from maskmoe_kernels.models import GRU, InterpretableGRU, InterpretableTransformer, Transformer
from maskmoe_kernels.models.sessions import SessionExperts, SessionModel, UserTable
from maskmoe_kernels.ops.selection import mixture
from maskmoe_kernels.ops.selection.api import Mixture

#: Users from which on sparse gradients of their embeddings are faster than dense ones.
SPARSE_FROM = 150_000


def build(
    settings: Settings, schema: Schema = MSSD, users: int = 1, sparse: bool = True
) -> SessionModel:
    """Build a model and initialise it from the seed. Changes the state of torch's generator.

    Args:
        settings: What to build.
        schema: The groups and the experts.
        users: Rows of the table of embeddings, if the schema has one.
        sparse: Whether its gradients are sparse where that is faster.
    """
    torch.manual_seed(settings.seed)
    family, first, second = schema.family, schema.first_groups, schema.second_groups
    width, heads, layers = settings.width, settings.heads, settings.layers
    table = None
    if schema.embedding is not None:
        sparse &= users >= SPARSE_FROM
        table = UserTable(users, schema.embedding[0], first, second, sparse=sparse)
    options: dict[str, Any] = {
        "users": table, "strict": settings.embeddings == "strict", "first_groups": first,
    }  # fmt: skip
    if settings.model == "interpretable-transformer":
        return InterpretableTransformer(family, second, width, heads, layers, **options)
    if settings.model == "interpretable-gru":
        return InterpretableGRU(family, second, width, layers, **options)
    features = sum(first.values()), sum(second.values())
    experts = family.num_experts
    if settings.model == "black-box-transformer":
        return Transformer(*features, experts * width, experts * heads, layers, users=table)
    return GRU(*features, experts * width, layers, users=table)


def logits_of(net: nn.Module, batch: SessionBatch, settings: Settings) -> Tensor:
    """The logits of a batch in the precision of the settings.

    Args:
        net: A model of :func:`build`, or one that wraps it.
        batch: B sessions.
        settings: What the model was built from.
    Returns:
        ``(B, 10, H)``, of a black box ``(B, 10)``; float32.
    """
    dtype = PRECISIONS[settings.precision]
    device = batch.first.device.type
    with nullcontext() if dtype is None else torch.autocast(device, dtype):
        logits: Tensor = net(
            batch.first, batch.second, batch.first_padding, batch.second_padding, batch.user
        )
    return logits.float()


def probability(model: SessionModel, logits: Tensor, settings: Settings) -> Tensor:
    """The probability of a skip: of the experts, or the sigmoid of a black box's logits.

    Args:
        model: From :func:`build`.
        logits: From :func:`logits_of`.
        settings: What the model was built from.
    Returns:
        ``(B, 10)``.
    """
    if isinstance(model, SessionExperts):
        return decided(logits, model.family, settings).probability
    return logits.sigmoid()


def decided(
    logits: Tensor, family: SubsetFamily, settings: Settings, sharpness: float | None = None
) -> Mixture:
    """Prediction, and the share of each expert in the decision.

    Args:
        logits: ``(*, H)``.
        family: The subsets of the experts.
        settings: What the model was built from. If the smallest expert that suffices explains, the
            one that sees all predicts, and the whole share is that of the former.
        sharpness: Of the mixture; ``None``: that of the settings.

    Raises:
        DataError: A sharpness where experts are not mixed.
    """
    if not settings.suffices:
        power = settings.sharpness if sharpness is None else sharpness
        return mixture(logits, family, settings.confidence, power)
    if sharpness is not None:
        raise DataError(
            "--sharpness mixes experts, and this model's are not mixed (it was trained with "
            "--explain sufficient): leave it out"
        )
    found = sufficient(logits, family, TOLERANCE)
    share = F.one_hot(found.expert, family.num_experts).to(logits.dtype)
    return Mixture(found.prediction, share, share)
