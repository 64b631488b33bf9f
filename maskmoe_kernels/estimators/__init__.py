"""Scikit-learn's interface on DataFrames: fit, predict, explain (extra ``sklearn``)."""

try:
    from maskmoe_kernels.estimators.classifier import InterpretableClassifier
    from maskmoe_kernels.estimators.regressor import InterpretableRegressor
except ModuleNotFoundError as error:
    missing = (error.name or "").partition(".")[0]
    if missing not in ("narwhals", "pandas", "safetensors", "sklearn"):
        raise
    raise ModuleNotFoundError(
        f"maskmoe_kernels.estimators needs {missing}, which is not installed: "
        "pip install 'maskmoe_kernels[sklearn]'",
        name=missing,
    ) from None

__all__ = ["InterpretableClassifier", "InterpretableRegressor"]
