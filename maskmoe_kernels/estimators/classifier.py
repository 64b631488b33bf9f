"""``InterpretableClassifier``: two classes or more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import ClassifierMixin
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, column_or_1d
from torch import Tensor

from maskmoe_kernels.estimators.base import checked_mapping
from maskmoe_kernels.estimators.explaining import Interpretable
from maskmoe_kernels.estimators.storage import labels_from_json, labels_to_json
from maskmoe_kernels.estimators.tables import Array


class InterpretableClassifier(ClassifierMixin, Interpretable):
    """A classifier whose every answer says which groups of columns it rests on.

    An expert for each chosen subset S of the groups learns the log-odds of E[y | x_S]; what is
    predicted is the answer of the one that sees all. The others explain it: see :meth:`explain`.

    Args:
        subsets: Which experts there are besides the one that sees all. ``"auto"``: every subset of
            up to 6 groups; of more, each group alone, the pairs that a screen finds worth it, and
            the beginnings of some orders of the groups. ``"forward"``: each group alone, the
            subsets that forward selection finds worth it on held-out rows (level by level, a
            kept subset with one group more, if it is clearly better than without), and the
            beginnings of some orders. ``"powerset"``, ``"pairs"``, ``"singles"``, or a list of
            lists of groups.
        groups: Name to the columns of a group, by name or position; other columns are groups of
            their own. ``None``: every column is one.
        categorical: Columns whose numbers are names of categories. Text, categories and
            enumerations of a DataFrame are categories anyway.
        max_experts: At the most; ``"auto"`` then takes fewer pairs, ``"forward"`` fewer subsets.
            ``None``: any number; of ``"forward"``, four a group, besides those of the orders.
        units: Units of an expert in each hidden layer.
        top_units: Those of the expert that sees all. ``None``: 32; 128 from 10,000 rows on.
        layers: Hidden layers. ``None``: 1; 2 from 10,000 rows on.
        max_bins: Bins of a numeric column; with few rows, there are fewer; four times as many where
            its values recur, 20 rows each on average.
        max_categories: Of a categorical column that get an embedding of their own; rarer ones
            share one.
        n_bags: Networks whose log-odds are averaged; each has other validation rows. ``None``: 8;
            4 from 2000 rows on, 2 from 100,000.
        learning_rate: Adam's largest.
        weight_decay: Decoupled (AdamW).
        batch_size: Rows of a training step.
        max_epochs: Passes over the rows, at the most; ``None``: 80, but as many as make
            1000 to 8000 steps, and at least 5.
        early_stopping: Stop when the loss of held-out rows no longer falls, in the mean over the
            bags, and take back what did not help; ``"auto"``: if there are at least 100 different
            rows.
        validation_fraction: Of the rows that each bag holds out.
        patience: Looks at the held-out rows (an epoch, or 10 steps) without a better loss.
        class_weight: ``None``, ``"balanced"``, or class to weight.
        random_state: Seed; the same one gives the same bits on the same machine.
        device: Where to train; ``None``: the CPU.
        verbose: Show progress.

    Attributes:
        classes_: The labels, ``(K,)``.
        family_: The experts.
        encoder_: What was fitted to each column.
        pair_gains_: What the screen found about each pair, best first, and which were kept.
        subset_gains_: What forward selection found about each subset that it looked at, best
            first: ``groups``, ``gain`` (in nats of the log loss; of a regression, as a share of the
            variance of y), ``error`` (the gain's standard error) and ``kept``.
        orders_: Orders of the groups, by number, of which every beginning has an expert;
            contributions add up along them where there is no power set.
        base_: The answer before any column is seen: the log-odds of the training rows.
        ridge_: Penalty of the linear model that each expert started as, chosen by held-out rows;
            infinite where it started as the constant answer.
        validation_loss_: Of each bag, at each look; the first is that of the start.
        n_features_in_: Columns.
        feature_names_in_: Their names, if X was a DataFrame.

    Example:
        >>> X, y = [[0.0], [1.0], [2.0], [3.0]] * 10, [False, False, True, True] * 10
        >>> fitted = InterpretableClassifier(random_state=0).fit(X, y)
        >>> fitted.explain(X).contributions.shape
        (40, 1)
    """

    classes_: Array

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
        class_weight: str | Mapping[Any, float] | None = None,
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
        self.class_weight = class_weight
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Learn from rows.

        Args:
            X: DataFrame of pandas, polars or Arrow, or an array, ``(rows, columns)``.
            y: Labels of any kind, ``(rows,)``.
            sample_weight: How often each row counts, ``(rows,)``.

        Raises:
            ValueError: Input that cannot be learned from; the message names the column or the
                parameter, and what to do.
        """
        return self._fit(X, y, sample_weight)

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:
        """Learn from the next rows of a stream: one pass over them.

        The first call fits bins, categories and experts to its rows, which should be many; they
        stay. There is no early stopping, and the learning rate is constant.

        Args:
            X: As for :meth:`fit`.
            y: Labels.
            classes: All labels that will come, ``(K,)``; the first call may leave them out if it
                has every class.
            sample_weight: As for :meth:`fit`.
        """
        first = not hasattr(self, "networks_")
        self._known = None if classes is None else np.unique(classes)
        if not first:
            self._known = self.classes_
        try:
            return self._partial_fit(X, y, sample_weight, first)
        finally:
            del self._known

    def decision_function(self, X: Any) -> Array:
        """Log-odds of the second class, ``(rows,)``; of K > 2 classes ``(rows, K)``, of mean 0."""
        return self._answer(X)

    def predict_proba(self, X: Any) -> Array:
        """Probabilities of the classes, ``(rows, K)``."""
        answer = torch.from_numpy(self._answer(X))
        if answer.dim() == 1:
            answer = torch.stack([torch.zeros_like(answer), answer], dim=1)
        probability: Array = answer.softmax(1).numpy()
        return probability

    def predict(self, X: Any) -> Array:
        """The most probable class of each row, ``(rows,)``."""
        answer = self._answer(X)
        chosen = answer.argmax(1) if answer.ndim == 2 else (answer > 0).astype(np.int64)
        labels: Array = self.classes_[chosen]
        return labels

    # --- For the common part -------------------------------------------------------------------

    @property
    def _kind(self) -> str:
        return "binary" if len(self.classes_) == 2 else "multiclass"

    @property
    def _outputs(self) -> int | None:
        return None if len(self.classes_) == 2 else len(self.classes_)

    @property
    def _labels(self) -> list[Any]:
        labels: list[Any] = self.classes_.tolist()
        return labels

    @property
    def _unit(self) -> str:
        return f"log-odds of {self.classes_[1]}" if self._outputs is None else "log-odds"

    @property
    def _tolerance(self) -> float:
        return 0.5

    def _own_state(self) -> dict[str, Any]:
        return {"classes": labels_to_json(self.classes_)}

    def _set_own_state(self, record: dict[str, Any]) -> None:
        self.classes_ = labels_from_json(record["classes"])
        if len(self.classes_) < 2:
            raise ValueError("fewer than two classes")

    def _encode_target(self, y: Any, rows: int, weight: Array) -> tuple[Array, Array]:
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None")
        labels = column_or_1d(y, warn=True)
        check_consistent_length(np.empty(rows), labels)
        if labels.dtype == object and any(value is None or value != value for value in labels):
            raise ValueError("y holds missing labels (None or NaN); leave these rows out")
        check_classification_targets(labels)
        known = getattr(self, "_known", None)
        there = np.unique(labels[weight > 0])
        classes = there if known is None else known
        strange = np.setdiff1d(there, classes)
        if len(strange):
            raise ValueError(
                f"y holds the class {strange[0]!r}, which is not among the classes "
                f"{classes.tolist()} of the first call of partial_fit"
            )
        if len(classes) < 2:
            raise ValueError(
                f"y holds one class only, {classes[0]!r}, where sample_weight is above 0; a "
                "classifier needs at least two"
            )
        self.classes_ = classes
        if self.class_weight is not None:
            weight = weight * self._class_weights(labels)
        at = np.searchsorted(classes, labels)
        return np.minimum(at, len(classes) - 1), weight

    def _class_weights(self, labels: Array) -> Array:
        if self.class_weight != "balanced":
            for label, value in checked_mapping(self.class_weight, "class_weight").items():
                if label not in self.classes_:
                    raise ValueError(
                        f"class_weight names {label!r}, which is not among the classes "
                        f"{self.classes_.tolist()}"
                    )
                if not 0 <= value < np.inf:
                    raise ValueError(f"class_weight[{label!r}] must be at least 0, got {value!r}")
        weights: Array = compute_sample_weight(self.class_weight, labels)
        return weights

    def _learn_target(self, y: Any, weight: Array) -> Array:
        share = np.bincount(y, weight, minlength=len(self.classes_)) / weight.sum()
        logs = np.log(np.maximum(share, 1e-6))
        self.base_ = float(logs[1] - logs[0]) if len(logs) == 2 else logs - logs.mean()
        return np.asarray(y)

    def _in_units(self, logits: Tensor) -> Tensor:
        if logits.dim() == 2:
            return 2 * logits  # p = sigmoid(2 z)
        return logits - logits.mean(-1, keepdim=True)
