"""Modules built on the masked linear op."""

from maskmoe_kernels.nn.attention import MaskedMultiheadAttention
from maskmoe_kernels.nn.convert import (
    ConversionRecord,
    ConversionReport,
    convert_,
    revert_,
)
from maskmoe_kernels.nn.converted import ConvertedLinear
from maskmoe_kernels.nn.embedding import ContentEncoder, table_of
from maskmoe_kernels.nn.gru import MaskedGRU, MaskedGRUCell
from maskmoe_kernels.nn.linear import MaskedLinear
from maskmoe_kernels.nn.mlp import MaskedMLP
from maskmoe_kernels.nn.norm import ExpertNorm
from maskmoe_kernels.nn.optimizers import pack_optimizer_state
from maskmoe_kernels.nn.routed import unrouted
from maskmoe_kernels.nn.row_adam import RowAdam
from maskmoe_kernels.nn.stacked import StackedLinear

__all__ = [
    "ContentEncoder",
    "ConversionRecord",
    "ConversionReport",
    "ConvertedLinear",
    "ExpertNorm",
    "MaskedGRU",
    "MaskedGRUCell",
    "MaskedLinear",
    "MaskedMLP",
    "MaskedMultiheadAttention",
    "RowAdam",
    "StackedLinear",
    "convert_",
    "pack_optimizer_state",
    "revert_",
    "table_of",
    "unrouted",
]
