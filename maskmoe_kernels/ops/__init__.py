"""The masked linear map as a registered op, its routed gradient, and the functional front end."""

from maskmoe_kernels.ops.functional import masked_linear

__all__ = ["masked_linear"]
