"""The definition of a masked MLP, in float64: plain differentiable PyTorch, layer after layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.subsets import SubsetFamily
from maskmoe_kernels.ops.masked_linear.reference import dense_oracle
from maskmoe_kernels.ops.masked_mlp.call import Inputs
from maskmoe_kernels.ops.selection.reference import (
    expert_loss_reference,
    gem_loss_reference,
    mixture_reference,
)


def masked_mlp(
    inputs: Tensor | Inputs,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layouts: Sequence[BlockLayout],
    activation: str = "none",
) -> Tensor:
    """``h_k = act(W_k h_{k-1} + b_k)``, without ``act`` in the last layer: ``(*, out)`` float64.

    Args:
        inputs: ``(*, in_features)`` of the first layout, or its parts.
        weights: Packed, ``(layouts[k].num_weights,)``.
        biases: ``(layouts[k].out_features,)`` each, or none at all.
        layouts: Of each layer.
        activation: Of all layers but the last.
    """
    h = inputs.joined() if isinstance(inputs, Inputs) else inputs
    for k, (weight, layout) in enumerate(zip(weights, layouts, strict=True)):
        act = activation if k < len(layouts) - 1 else "none"
        h = dense_oracle(h, weight, biases[k] if biases else None, layout, act)
    return h


def masked_mlp_mixture(
    inputs: Tensor | Inputs,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layouts: Sequence[BlockLayout],
    activation: str,
    family: SubsetFamily,
    confidence: str = "abs",
    sharpness: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Probability, selection and attribution of the logits of :func:`masked_mlp`, float64."""
    with torch.no_grad():
        logits = masked_mlp(inputs, weights, biases, layouts, activation)
        return mixture_reference(logits, family, confidence, sharpness)


def masked_mlp_gem(
    inputs: Tensor | Inputs,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layouts: Sequence[BlockLayout],
    activation: str,
    target: Tensor,
    family: SubsetFamily,
    confidence: str = "abs",
    sharpness: float = 1.0,
    weighting: str = "selection",
    normalize: str | None = None,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """The GEM loss of the logits of :func:`masked_mlp`, ``()`` float64."""
    logits = masked_mlp(inputs, weights, biases, layouts, activation)
    return gem_loss_reference(
        logits, target, family, confidence, weighting, normalize, mask, sharpness, sample_weight
    )


def masked_mlp_expert_loss(
    inputs: Tensor | Inputs,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layouts: Sequence[BlockLayout],
    activation: str,
    target: Tensor,
    kind: str,
    outputs: int | None = None,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """The loss of every expert, of ``outputs`` units each, on every sample of a batch ``(n, in)``.

    ``()`` float64; see :func:`expert_loss_reference`.
    """
    z = masked_mlp(inputs, weights, biases, layouts, activation)
    z = z if outputs is None else z.unflatten(-1, (-1, outputs))
    return expert_loss_reference(z, target, kind, sample_weight, mask)
