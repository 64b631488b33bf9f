"""The definitions of all ops, gathered: each stands in the ``reference.py`` of its op."""

from maskmoe_kernels.ops.masked_linear.reference import dense_oracle
from maskmoe_kernels.ops.masked_linear.reference import masked_linear as dense_algebra

__all__ = ["dense_algebra", "dense_oracle"]
