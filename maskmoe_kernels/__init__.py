"""Networks whose weights are block-sparse by subset inclusion: predictions with attribution.

The names below are the public contract; see README.md for a tour.
"""

import maskmoe_kernels._interrupt  # noqa: F401  # first: importing the rest takes seconds
from maskmoe_kernels import testing
from maskmoe_kernels.errors import BackendError, DataError, LayoutError
from maskmoe_kernels.explain import interactions, moebius, shapley, sufficient
from maskmoe_kernels.layout import BlockLayout, SubsetFamily
from maskmoe_kernels.models import InterpretableGRU, InterpretableMLP, InterpretableTransformer
from maskmoe_kernels.nn import (
    ConversionRecord,
    ConversionReport,
    ConvertedLinear,
    ExpertNorm,
    MaskedGRU,
    MaskedGRUCell,
    MaskedLinear,
    MaskedMLP,
    MaskedMultiheadAttention,
    convert_,
    revert_,
)
from maskmoe_kernels.ops import Inputs, masked_linear
from maskmoe_kernels.ops.dispatch import info
from maskmoe_kernels.ops.selection import expert_loss, gem_loss, mixture, selection

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BlockLayout",
    "ConversionRecord",
    "ConversionReport",
    "ConvertedLinear",
    "DataError",
    "ExpertNorm",
    "Inputs",
    "InterpretableGRU",
    "InterpretableMLP",
    "InterpretableTransformer",
    "LayoutError",
    "MaskedGRU",
    "MaskedGRUCell",
    "MaskedLinear",
    "MaskedMLP",
    "MaskedMultiheadAttention",
    "SubsetFamily",
    "convert_",
    "expert_loss",
    "gem_loss",
    "info",
    "interactions",
    "masked_linear",
    "mixture",
    "moebius",
    "revert_",
    "selection",
    "shapley",
    "sufficient",
    "testing",
]
