"""The masked linear map as a registered op, its routed gradient, and the functional front end."""

from maskmoe_kernels.ops.masked_linear.api import masked_linear
from maskmoe_kernels.ops.masked_mlp.call import Inputs

__all__ = ["Inputs", "masked_linear"]
