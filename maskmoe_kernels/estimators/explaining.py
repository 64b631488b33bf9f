"""The methods of a fitted estimator that explain, save and load it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch

from maskmoe_kernels.errors import DataError, LayoutError
from maskmoe_kernels.estimators.encoder import Encoder
from maskmoe_kernels.estimators.explanation import Explanation, Rows, contributions_of, explained
from maskmoe_kernels.estimators.storage import (
    parameters_from_json,
    plain_parameters,
    read_model,
    write_model,
)
from maskmoe_kernels.estimators.streams import Streamed
from maskmoe_kernels.estimators.subsets import PairGain, SubsetGain, family_of
from maskmoe_kernels.estimators.tables import Array, Table
from maskmoe_kernels.estimators.whole_model import GlobalExplanation, pairs_of, shapes_of
from maskmoe_kernels.explain.sufficient import sufficient

#: Training rows over which a model is summed up.
_SUMMED_UP = 1000


class Interpretable(Streamed):
    """An estimator that explains itself."""

    summary_: dict[str, list[float]]

    @property
    def _labels(self) -> list[Any] | None:
        """Classes; ``None`` for a regression."""
        return None

    @property
    def _unit(self) -> str:
        raise NotImplementedError

    @property
    def _tolerance(self) -> float:
        """Of sufficiency, if none is given."""
        raise NotImplementedError

    def explain(self, X: Any, of: Any = None, tolerance: float | None = None) -> Explanation:
        """Why these rows get their answers.

        Args:
            X: Rows as in ``fit``.
            of: Of more than two classes, the one that is explained; ``None``: that which is
                predicted for each row.
            tolerance: By how much the answer of a sufficient subset may differ from that of all
                groups, in log-odds or like y; ``None``: 0.5, or a tenth of the standard deviation
                of y.

        Raises:
            ValueError: Not the columns of ``fit``, an unknown class, a bad tolerance, or experts
                that cannot tell the groups apart.
        """
        self._check_fitted()
        table = self._read(X, reset=False)
        tolerance = self._checked(tolerance)
        values = self._values(table)
        chosen = None
        if values.dim() == 3:
            chosen = self._class_of(of, values[:, int(self.family_.membership.sum(1).argmax())])
        elif of is not None:
            raise ValueError(f"of={of!r} is for more than two classes; leave it out")
        index = X.index if isinstance(X, pd.DataFrame) else None
        rows = Rows(table, self.encoder_.groups)
        game = values, self.family_, self.base_, self.orders_
        tells = self._unit, self._labels
        return explained(*game, tolerance, chosen, rows, index, *tells)

    def explain_global(self, tolerance: float | None = None) -> GlobalExplanation:
        """What the model does on the whole.

        Args:
            tolerance: Only that of ``fit`` is known, so ``None``.
        """
        self._check_fitted()
        if tolerance is not None:
            raise ValueError(
                "explain_global knows the shares for the tolerance of fit only; take "
                "explain(X, tolerance=...).sufficient of rows of your own"
            )
        importance = pd.Series(self.summary_["importance"], [*self.family_.groups])
        share = pd.Series(self.summary_["sufficient"], self.family_.names)
        return GlobalExplanation(
            importance=importance.sort_values(ascending=False, kind="stable"),
            sufficient=share.sort_values(ascending=False, kind="stable"),
            subsets=dict(self.family_.subsets),
            gains=self.subset_gains_,
            shapes=shapes_of(self.encoder_, self.family_, self._values),
            pairs=pairs_of(self.encoder_, self.family_, self.base_, self._values),
            base=self.base_,
            tolerance=self._tolerance,
            unit=self._unit,
            classes=self._labels,
        )

    def _sum_up(self, table: Table, weight: Array) -> None:
        if table.rows > _SUMMED_UP:
            rows = np.linspace(0, table.rows - 1, _SUMMED_UP).astype(np.int64)
            table, weight = table.taken(rows), weight[rows]
        values = self._values(table)
        many = values.dim() == 3
        importance = np.full(self.family_.num_groups, np.nan)
        try:
            phi = contributions_of(values, self.family_, self.base_, self.orders_).abs()
            phi = phi.mean(-1) if many else phi
            importance = np.average(phi.numpy(), axis=0, weights=weight)
        except LayoutError:  # a list of subsets that does not tell the groups apart
            pass
        found = sufficient(
            values if many else values / 2, self.family_, self._tolerance, dim=-2 if many else -1
        )
        count = np.bincount(found.expert.numpy(), weight, minlength=self.family_.num_experts)
        self.summary_ = {
            "importance": importance.tolist(),
            "sufficient": (count / count.sum()).tolist(),
        }

    def _checked(self, tolerance: float | None) -> float:
        if tolerance is None:
            return self._tolerance
        if not isinstance(tolerance, (int, float)) or not 0 <= tolerance < np.inf:
            raise ValueError(f"tolerance must be a number, 0 or more, got {tolerance!r}")
        return float(tolerance)

    def _class_of(self, of: Any, answer: torch.Tensor) -> Array:
        if of is None:
            chosen: Array = answer.argmax(1).numpy()
            return chosen
        labels = self._labels or []
        if of not in labels:
            raise ValueError(f"of must be one of the classes {labels}, got {of!r}")
        return np.full(len(answer), labels.index(of))

    # --- Files ---------------------------------------------------------------------------------

    def _own_state(self) -> dict[str, Any]:
        """What a subclass keeps, as plain values."""
        raise NotImplementedError

    def _set_own_state(self, record: dict[str, Any]) -> None:
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Write the fitted model to one file: safetensors, with JSON in its header; no pickle.

        A kill leaves the file that was there, or the new one. The state of Adam is not kept:
        ``partial_fit`` goes on with a new one.

        Raises:
            OSError: It cannot be written.
            ValueError: Class labels that are neither text nor numbers.
        """
        self._check_fitted()
        names = getattr(self, "feature_names_in_", None)
        record = {
            "class": type(self).__name__,
            "parameters": plain_parameters(self.get_params(deep=False)),
            "encoder": self.encoder_.to_json(),
            "subsets": [list(members) for members in self.family_.subsets.values()],
            "orders": self.orders_,
            "pair_gains": [[*gain.groups, gain.gain, gain.kept] for gain in self.pair_gains_],
            "subset_gains": [
                [list(found.groups), found.gain, found.error, found.kept]
                for found in self.subset_gains_
            ],
            "columns": None if names is None else names.tolist(),
            "summary": {
                key: [None if value != value else value for value in values]
                for key, values in self.summary_.items()
            },
            "validation_loss": self.validation_loss_,
            "ridge": [None if math.isinf(ridge) else ridge for ridge in self.ridge_.tolist()],
            "seed": self._seed,
            "shape": list(self.networks_[0].shape),
            "base": np.asarray(self.base_).tolist(),
            **self._own_state(),
        }
        tensors = {
            f"{k}.{name}": value
            for k, network in enumerate(self.networks_)
            for name, value in network.named_parameters()
        }
        write_model(path, record, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The model that :meth:`save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            DataError: It is damaged, of another class or of a later version.
        """
        record, tensors = read_model(path)
        if record.get("class") != cls.__name__:
            raise DataError(
                f"{path}: a model of the class {record.get('class')}, and this is {cls.__name__}"
            )
        try:
            model = cls(**parameters_from_json(record["parameters"]))
            model._restore(record)
            model._restore_networks(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            raise DataError(
                f"{path}: its parts do not fit each other ({error}); save the model again"
            ) from None
        return model

    def _restore(self, record: dict[str, Any]) -> None:
        self.encoder_ = Encoder.from_json(record["encoder"])
        self.family_ = family_of(self.encoder_.widths, record["subsets"])
        self.pair_gains_ = [
            PairGain((str(a), str(b)), float(gain), bool(kept))
            for a, b, gain, kept in record["pair_gains"]
        ]
        self.subset_gains_ = [
            SubsetGain(tuple(map(str, groups)), float(gain), float(error), bool(kept))
            for groups, gain, error, kept in record["subset_gains"]
        ]
        self.orders_ = [[int(n) for n in order] for order in record["orders"]]
        if any(sorted(order) != [*range(self.family_.num_groups)] for order in self.orders_):
            raise ValueError("an order does not hold every group once")
        self.n_features_in_ = len(self.encoder_.columns)
        if record["columns"] is not None:
            self.feature_names_in_ = np.array(record["columns"], dtype=object)
        self.summary_ = {
            key: [np.nan if value is None else float(value) for value in values]
            for key, values in record["summary"].items()
        }
        self.validation_loss_ = record["validation_loss"]
        ridges = [math.inf if ridge is None else float(ridge) for ridge in record["ridge"]]
        self.ridge_ = torch.tensor(ridges)
        self._seed = int(record["seed"])
        base = np.asarray(record["base"], dtype=np.float64)
        self.base_ = float(base) if base.ndim == 0 else base
        units, top_units, layers = map(int, record["shape"])
        self._stored_shape = units, top_units, layers
        self._set_own_state(record)

    def _restore_networks(self, tensors: dict[str, torch.Tensor]) -> None:
        bags = sorted({int(name.partition(".")[0]) for name in tensors})
        self.networks_ = [self._network(self._seed + k, self._stored_shape) for k in bags]
        del self._stored_shape
        for k, network in zip(bags, self.networks_, strict=True):
            own = {n.partition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{k}.")}
            with torch.no_grad():
                parameters = dict(network.named_parameters())
                if parameters.keys() != own.keys():
                    raise ValueError(f"tensors {sorted(parameters.keys() ^ own.keys())[:4]}")
                for name, parameter in parameters.items():
                    if parameter.shape != own[name].shape:
                        raise ValueError(f"tensor {k}.{name} has shape {tuple(own[name].shape)}")
                    parameter.copy_(own[name])
        self._optimizers = []
