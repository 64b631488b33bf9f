"""Networks whose output is one logit per expert, and the black boxes they are measured against."""

from maskmoe_kernels.models.mlp import InterpretableMLP
from maskmoe_kernels.models.ncf import NCF, InterpretableNCF, NCFSizes

__all__ = ["NCF", "InterpretableMLP", "InterpretableNCF", "NCFSizes"]
