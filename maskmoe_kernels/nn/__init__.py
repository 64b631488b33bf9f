"""Modules built on the masked linear op."""

from maskmoe_kernels.nn.embedding import ContentEncoder
from maskmoe_kernels.nn.linear import MaskedLinear

__all__ = ["ContentEncoder", "MaskedLinear"]
