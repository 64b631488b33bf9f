"""Models with one logit per expert, and the black boxes that they are compared with."""

from maskmoe_kernels.models.gru import GRU, InterpretableGRU
from maskmoe_kernels.models.mlp import InterpretableMLP
from maskmoe_kernels.models.ncf import NCF, InterpretableNCF, NCFSizes
from maskmoe_kernels.models.sessions import UserTable, half_layout
from maskmoe_kernels.models.transformer import InterpretableTransformer, Transformer

__all__ = [
    "GRU",
    "NCF",
    "InterpretableGRU",
    "InterpretableMLP",
    "InterpretableNCF",
    "InterpretableTransformer",
    "NCFSizes",
    "Transformer",
    "UserTable",
    "half_layout",
]
