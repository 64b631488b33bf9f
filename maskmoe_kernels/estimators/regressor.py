"""``InterpretableRegressor``: one number a row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np
from sklearn.base import RegressorMixin
from sklearn.utils.validation import check_array, check_consistent_length, column_or_1d
from torch import Tensor

from maskmoe_kernels.estimators.explaining import Interpretable
from maskmoe_kernels.estimators.tables import Array


class InterpretableRegressor(RegressorMixin, Interpretable):
    """A regressor whose every answer says which groups of columns it rests on.

    An expert for each chosen subset S of the groups learns E[y | x_S] (squared error); what is
    predicted is the answer of the one that sees all. The others explain it: see :meth:`explain`.

    Args and attributes are those of :class:`InterpretableClassifier`, without ``class_weight`` and
    ``classes_``; ``base_`` is the mean of y.
    """

    def __init__(
        self,
        subsets: str | Iterable[Iterable[str]] = "auto",
        groups: Mapping[str, Iterable[str | int]] | None = None,
        *,
        categorical: Iterable[str | int] | None = None,
        max_experts: int | None = None,
        units: int = 8,
        top_units: int | None = None,
        layers: int | None = None,
        max_bins: int = 32,
        max_categories: int = 256,
        n_bags: int | None = None,
        learning_rate: float = 5e-3,
        weight_decay: float = 0.1,
        batch_size: int = 256,
        max_epochs: int | None = None,
        early_stopping: str | bool = "auto",
        validation_fraction: float = 0.15,
        patience: int = 5,
        random_state: Any = None,
        device: str | None = None,
        verbose: int = 0,
    ) -> None:
        self.subsets = subsets
        self.groups = groups
        self.categorical = categorical
        self.max_experts = max_experts
        self.units = units
        self.top_units = top_units
        self.layers = layers
        self.max_bins = max_bins
        self.max_categories = max_categories
        self.n_bags = n_bags
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Learn from rows; see :meth:`InterpretableClassifier.fit`.

        Args:
            X: ``(rows, columns)``.
            y: Finite numbers, ``(rows,)``.
            sample_weight: ``(rows,)``.
        """
        return self._fit(X, y, sample_weight)

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Learn from the next rows of a stream; see :meth:`InterpretableClassifier.partial_fit`.

        The first call also fixes the scale of y: that of its rows.
        """
        return self._partial_fit(X, y, sample_weight, not hasattr(self, "networks_"))

    def predict(self, X: Any) -> Array:
        """The expected y of each row, ``(rows,)``."""
        return self._answer(X)

    # --- For the common part -------------------------------------------------------------------

    @property
    def _kind(self) -> str:
        return "regression"

    @property
    def _outputs(self) -> int | None:
        return None

    @property
    def _unit(self) -> str:
        return "units of y"

    @property
    def _tolerance(self) -> float:
        return 0.1 * self.scale_

    def _own_state(self) -> dict[str, Any]:
        return {"scale": self.scale_}

    def _set_own_state(self, record: dict[str, Any]) -> None:
        self.scale_ = float(record["scale"])

    def _encode_target(self, y: Any, rows: int, weight: Array) -> tuple[Array, Array]:
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None")
        numbers = check_array(y, ensure_2d=False, dtype=np.float64, input_name="y")
        if numbers.ndim == 2 and numbers.shape[1] > 1:
            raise ValueError(
                f"y must be one number a row, got {numbers.shape[1]}; fit one regressor for each "
                "(sklearn.multioutput.MultiOutputRegressor)"
            )
        target: Array = column_or_1d(numbers, warn=True)
        check_consistent_length(np.empty(rows), target)
        return target, weight

    def _learn_target(self, y: Any, weight: Array) -> Array:
        self.base_ = float(np.average(y, weights=weight))
        spread = float(np.sqrt(np.average((y - self.base_) ** 2, weights=weight)))
        self.scale_ = spread if spread > 0 else 1.0
        return self._later_target(y)

    def _later_target(self, target: Array) -> Array:
        scaled: Array = (target - self.base_) / self.scale_
        return scaled

    def _in_units(self, logits: Tensor) -> Tensor:
        return logits.mul(self.scale_).add(self.base_)
