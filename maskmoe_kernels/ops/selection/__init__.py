"""From logits to selection, mixture and loss. Nothing here knows a model."""

from maskmoe_kernels.ops.selection.gem import gem_loss
from maskmoe_kernels.ops.selection.mixture import Mixture, mixture
from maskmoe_kernels.ops.selection.selection import deselection, rare_positive, selection

__all__ = ["Mixture", "deselection", "gem_loss", "mixture", "rare_positive", "selection"]
