"""Check your own models: the float64 definition, isolation assertions, hypothesis strategies.

``strategies`` needs hypothesis, from the extra ``maskmoe_kernels[test]``; it is imported on
first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from maskmoe_kernels.testing.agreement import assert_close_to_oracle
from maskmoe_kernels.testing.assertions import assert_blind, assert_gradient_isolated
from maskmoe_kernels.testing.oracle import dense_oracle

if TYPE_CHECKING:
    from maskmoe_kernels.testing import strategies

__all__ = [
    "assert_blind",
    "assert_close_to_oracle",
    "assert_gradient_isolated",
    "dense_oracle",
    "strategies",
]


def __getattr__(name: str) -> Any:
    if name != "strategies":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        importlib.import_module("hypothesis")
    except ImportError as error:
        raise ImportError(
            "maskmoe_kernels.testing.strategies needs hypothesis; install it with "
            "pip install 'maskmoe_kernels[test]'"
        ) from error
    return importlib.import_module("maskmoe_kernels.testing.strategies")
