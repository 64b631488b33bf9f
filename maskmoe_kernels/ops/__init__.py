"""Registered ops, one package each, and the one place that decides which implementation runs."""

from maskmoe_kernels.ops.masked_linear.api import masked_linear
from maskmoe_kernels.ops.masked_mlp.call import Inputs

__all__ = ["Inputs", "masked_linear"]
