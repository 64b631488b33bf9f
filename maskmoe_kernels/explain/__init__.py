"""Explanations computed from logits alone: who suffices, and what each group contributes.

The logits of a family's experts are the values v(S) of a game whose players are the feature
groups. Nothing here knows a model.
"""

from maskmoe_kernels.explain.shapley import interactions, moebius, shapley, shapley_residual
from maskmoe_kernels.explain.sufficient import Sufficient, sufficient

__all__ = ["Sufficient", "interactions", "moebius", "shapley", "shapley_residual", "sufficient"]
