"""Scikit-learn's interface on DataFrames: fit, predict, explain (extra ``sklearn``)."""

import importlib.util as _importlib

_MISSING = [
    name
    for name in ("sklearn", "narwhals", "pandas", "safetensors")
    if _importlib.find_spec(name) is None
]
if _MISSING:
    raise ImportError(
        f"maskmoe_kernels.estimators needs {', '.join(_MISSING)}, which is not installed: "
        "pip install 'maskmoe_kernels[sklearn]'"
    )

from maskmoe_kernels.estimators.classifier import InterpretableClassifier
from maskmoe_kernels.estimators.regressor import InterpretableRegressor

__all__ = ["InterpretableClassifier", "InterpretableRegressor"]
