"""From logits to selection, mixture and loss. Nothing here knows a model."""

from maskmoe_kernels.ops.selection.api import (
    Mixture,
    deselection,
    expert_loss,
    gem_loss,
    mixture,
    selection,
)
from maskmoe_kernels.ops.selection.confidence import rare_positive

__all__ = [
    "Mixture",
    "deselection",
    "expert_loss",
    "gem_loss",
    "mixture",
    "rare_positive",
    "selection",
]
