"""From logits to selection, mixture and loss. Nothing here knows a model."""

from maskmoe_kernels.ops.selection.api import (
    Mixture,
    deselection,
    gem_loss,
    mixture,
    selection,
)
from maskmoe_kernels.ops.selection.torch_impl import rare_positive

__all__ = ["Mixture", "deselection", "gem_loss", "mixture", "rare_positive", "selection"]
