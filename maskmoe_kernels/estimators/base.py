"""What classifier and regressor share: reading a table, choosing experts, training, values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from rich.progress import Progress
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import (
    _check_sample_weight,
    check_is_fitted,
    validate_data,
)
from torch import Tensor

from maskmoe_kernels.estimators.encoder import Encoder
from maskmoe_kernels.estimators.forward import Candidates, selected
from maskmoe_kernels.estimators.linear_start import start_linear
from maskmoe_kernels.estimators.subsets import (
    PairGain,
    SubsetGain,
    checked_groups,
    choose,
    drawn_orders,
    screened,
    takes_power_set,
)
from maskmoe_kernels.estimators.tables import CATEGORIES, Array, Table, as_categories, read_table
from maskmoe_kernels.estimators.training import (
    Chunks,
    Network,
    Pace,
    Samples,
    Split,
    train,
)
from maskmoe_kernels.explain.sufficient import top_expert
from maskmoe_kernels.layout.subsets import SubsetFamily

#: Up to so many rows, equal rows are merged: n equal rows and one of weight n are then one fit.
_MERGED = 10_000
#: With early_stopping="auto", fewer rows than this are all trained on.
FEW = 100
#: Rows from which on there are so many bags, and before.
_BAGS = {100_000: 2, 2000: 4, 0: 8}
#: From so many rows on, hidden layers and units of the expert that sees all; and before.
_MANY, _LARGE, _SMALL = 10_000, (2, 128), (1, 32)
#: Rows of a bin at the least, on average.
_ROWS_PER_BIN = 40

_NUMBERS: dict[str, tuple[type | tuple[type, ...], float, float]] = {
    "units": (int, 1, 4096),
    "max_bins": (int, 1, 4096),
    "max_categories": (int, 1, 1_000_000),
    "batch_size": (int, 1, 1 << 24),
    "patience": (int, 1, 1_000_000),
    "learning_rate": ((int, float), 1e-9, 10),
    "weight_decay": ((int, float), 0, 100),
    "validation_fraction": (float, 0.001, 0.9),
}


class Estimator(BaseEstimator):
    """The common part; see the two estimators for what its parameters mean."""

    encoder_: Encoder
    family_: SubsetFamily
    networks_: list[Network]
    validation_loss_: list[list[float]]
    ridge_: Tensor
    base_: Any
    _optimizers: list[torch.optim.Optimizer]
    n_features_in_: int
    # Parameters, which each subclass sets in its own __init__, as scikit-learn wants it.
    subsets: Any
    groups: Any
    categorical: Any
    max_experts: int | None
    units: int
    top_units: int | None
    layers: int | None
    max_bins: int
    max_categories: int
    n_bags: int | None
    learning_rate: float
    weight_decay: float
    batch_size: int
    max_epochs: int | None
    early_stopping: str | bool
    validation_fraction: float
    patience: int
    random_state: Any
    device: str | None
    verbose: int

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.string = True
        tags.input_tags.categorical = True
        tags.non_deterministic = False
        return tags

    # --- What a subclass says ------------------------------------------------------------------

    @property
    def _kind(self) -> str:
        """Of the loss: binary, multiclass or regression."""
        raise NotImplementedError

    @property
    def _outputs(self) -> int | None:
        raise NotImplementedError

    def _learn_target(self, y: Any, weight: Array) -> Array:
        """What the networks learn, ``(rows,)``; remembers how to turn it back. Sets ``base_``."""
        raise NotImplementedError

    def _in_units(self, logits: Tensor) -> Tensor:
        """Outputs of the experts as values: log-odds, or numbers like y."""
        raise NotImplementedError

    # --- Reading -------------------------------------------------------------------------------

    def _read(self, x: Any, reset: bool) -> Table:
        table = read_table(x, self.categorical)
        if table.labels is None:
            like: Any = np.empty((1, len(table.names)))
        else:
            like = pd.DataFrame(columns=table.labels)
        try:
            validate_data(self, like, reset=reset, skip_check_array=True)
        except ValueError as error:
            raise ValueError(
                f"{error}\nPass the columns that fit was given: X[model.feature_names_in_]"
            ) from None
        return table

    def _weight(self, sample_weight: Any, rows: int) -> Array:
        like = np.empty((rows, 1))
        weight: Array = _check_sample_weight(sample_weight, like, dtype=np.float64).copy()
        if (weight < 0).any():
            row = int((weight < 0).argmax())
            raise ValueError(
                f"sample_weight must be at least 0, got {weight[row]:g} in row {row}; to leave a "
                "row out, give it the weight 0"
            )
        return weight

    def _check_parameters(self) -> None:
        for name, (kind, low, high) in _NUMBERS.items():
            value = getattr(self, name)
            wanted = "an integer" if kind is int else "a number"
            allowed = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
            if isinstance(value, bool) or not isinstance(value, allowed):
                raise ValueError(f"{name} must be {wanted} from {low:g} to {high:g}, got {value!r}")
            if not low <= value <= high:
                raise ValueError(f"{name} must be {wanted} from {low:g} to {high:g}, got {value!r}")
        for name in ("layers", "top_units", "max_epochs", "max_experts", "n_bags"):
            value = getattr(self, name)
            whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
            if value is not None and (not whole or value < 1):
                raise ValueError(f"{name} must be None or an integer of at least 1, got {value!r}")
        if self.early_stopping not in ("auto", True, False):
            raise ValueError(
                f"early_stopping must be 'auto', True or False, got {self.early_stopping!r}"
            )
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError, TypeError) as error:
            raise ValueError(
                f"device={self.device!r} cannot be used: {str(error).splitlines()[0]}"
            ) from None

    # --- Fitting -------------------------------------------------------------------------------

    def _fit(self, x: Any, y: Any, sample_weight: Any) -> Self:
        self._check_parameters()
        table, target, weight = self._prepared(x, y, sample_weight)
        self._begin(table, target, weight)
        samples = self._samples(table, target, weight)
        splits = [self._split(samples, target, k) for k in range(len(self.networks_))]
        kept = [rows for rows, _ in splits]
        held = [None if rows is None else samples.taken(rows) for _, rows in splits]
        self.ridge_ = start_linear(self.networks_, samples, splits, self._kind, self._start)
        self._train(lambda: [(samples, kept)], min(map(len, kept)), held)
        self._sum_up(table, weight)
        return self

    def _train(self, chunks: Chunks, rows: int, held: list[Samples | None]) -> None:
        """Train all bags on the rows of ``chunks``, ``rows`` a pass."""
        steps = max(1, round(rows / self.batch_size))
        with Progress(disable=not self.verbose, transient=True) as bar:
            task = bar.add_task(f"training {len(self.networks_)} bags")

            def told(epoch: int, epochs: int) -> None:
                bar.update(task, completed=epoch, total=epochs)

            learn = chunks, steps, held, self._kind, self._pace(), self._seed, told
            self.validation_loss_ = train(self.networks_, *learn)

    def _prepared(self, x: Any, y: Any, sample_weight: Any) -> tuple[Table, Array, Array]:
        """Rows that count, equal ones merged, with what the networks learn and weights."""
        table = self._read(x, reset=True)
        weight = self._weight(sample_weight, table.rows)
        there = int((weight > 0).sum())
        if there < 2:
            raise ValueError(
                f"fit needs at least 2 rows of a sample_weight above 0, got {there} sample(s) "
                f"(n_samples = {there})"
            )
        target, weight = self._encode_target(y, table.rows, weight)
        counts = weight > 0
        if not counts.all():
            table, target, weight = table.taken(counts), target[counts], weight[counts]
        if table.rows <= _MERGED:
            table, target, weight = _merged(table, target, weight)
        return table, self._learn_target(target, weight), weight

    def _encode_target(self, y: Any, rows: int, weight: Array) -> tuple[Array, Array]:
        """Checked y as numbers ``(rows,)``, and weights times those of the classes."""
        raise NotImplementedError

    def _begin(self, table: Table, target: Array, weight: Array) -> None:
        """Fit the encoder, choose the experts, make the networks."""
        groups = checked_groups(self.groups, table.names)
        bins = int(min(self.max_bins, max(4, table.rows // _ROWS_PER_BIN)))
        self.encoder_ = Encoder.fitted(table, groups, weight, bins, self.max_categories)
        self._seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        layers, top_units = _LARGE if table.rows >= _MANY else _SMALL
        shape = self.units, self.top_units or top_units, self.layers or layers
        bags = self.n_bags or next(bags for rows, bags in _BAGS.items() if table.rows >= rows)
        self._choose(table, target, weight, shape, bags)
        self.networks_ = [self._network(self._seed + k, shape) for k in range(bags)]
        self._optimizers = []
        self.validation_loss_ = []
        self.ridge_ = torch.full((self.family_.num_experts,), math.inf)

    def _choose(
        self, table: Table, target: Array, weight: Array, shape: tuple[int, int, int], bags: int
    ) -> None:
        """Choose the experts, and remember why."""
        subsets, limit, groups = self.subsets, self.max_experts, len(self.encoder_.groups)
        named = subsets if isinstance(subsets, str) else None
        self.orders_: list[list[int]] = []
        self.pair_gains_: list[PairGain] = []
        self.subset_gains_: list[SubsetGain] = []
        if named == "auto" and not takes_power_set(groups, limit):
            self.orders_ = drawn_orders(groups, limit)
            in_orders = len(self.orders_) * (groups - 2)
            pairs = None if limit is None else limit - groups - 1 - in_orders
            one_hot = self._one_hot(target)
            self.pair_gains_ = screened(self.encoder_, table, one_hot, weight, pairs)
        if named == "forward":
            choose(subsets, self.encoder_.widths, limit, [])  # is there room for single groups?
            self.subset_gains_ = self._selected(table, target, weight, shape, min(bags, 2))
            learned = sum(found.kept and len(found.groups) > 1 for found in self.subset_gains_)
            self.orders_ = drawn_orders(groups, None if limit is None else limit - learned)
        gains: list[PairGain | SubsetGain] = [*self.pair_gains_, *self.subset_gains_]
        self.family_ = choose(subsets, self.encoder_.widths, limit, gains, self.orders_)

    def _selected(
        self, table: Table, target: Array, weight: Array, shape: tuple[int, int, int], bags: int
    ) -> list[SubsetGain]:
        """What forward selection finds on the rows that the first bags train on and hold out."""
        samples, splits = self._samples(table, target, weight), []
        for k in range(bags):
            kept, held = self._split(samples, target, k)
            if held is None:
                raise ValueError(
                    f"subsets='forward' compares subsets on held-out rows, and there are none with "
                    f"early_stopping={self.early_stopping!r} and {table.rows} different rows; take "
                    f"early_stopping='auto' and at least {FEW} different rows, or another subsets"
                )
            splits.append((kept, held))
        candidates = Candidates(
            self.encoder_, samples, splits, self._kind, self._outputs, shape, self._start,
            self._pace(), self._seed,
        )  # fmt: skip
        screen = screened(self.encoder_, table, self._one_hot(target), weight, None)
        return selected(candidates, [pair.groups for pair in screen], self.max_experts)

    def _network(self, seed: int, shape: tuple[int, int, int]) -> Network:
        network = Network(self.encoder_, self.family_, shape, self._outputs, seed)
        return network.to(self.device or "cpu")

    def _one_hot(self, target: Array) -> Array:
        if self._outputs is None:
            return np.array(target[:, None], dtype=np.float64)
        return np.array(target[:, None] == np.arange(self._outputs), dtype=np.float64)

    def _samples(self, table: Table, target: Array, weight: Array) -> Samples:
        kind = np.int64 if self._outputs else np.float32
        even = bool((weight == weight[0]).all())
        samples = Samples(
            self.encoder_.codes(table),
            torch.from_numpy(target.astype(kind)),
            None if even else torch.from_numpy(weight),
        )
        return samples.to(torch.device(self.device or "cpu"))

    def _pace(self) -> Pace:
        names = ("learning_rate", "weight_decay", "batch_size", "max_epochs", "patience")
        return Pace(*(getattr(self, name) for name in names))

    def _split(self, samples: Samples, target: Array, bag: int) -> Split:
        """Rows to train on and rows to validate on, of each class its share."""
        count, device = len(target), samples.target.device
        if not self.early_stopping or (self.early_stopping == "auto" and count < FEW):
            return torch.arange(count, device=device), None
        generator = torch.Generator().manual_seed(self._seed + bag)
        order = torch.randperm(count, generator=generator)
        if self._kind != "regression":
            of_class = torch.from_numpy(target)[order]
            order = order[of_class.argsort(stable=True)]
        fraction = self.validation_fraction
        # Every k-th row of those sorted by class: each class is split in the same proportion.
        place = torch.arange(count)
        first = float(torch.rand(1, generator=generator))
        held = ((place + 1) * fraction + first).floor() > (place * fraction + first).floor()
        if not held.any() or held.all():
            return torch.arange(count, device=device), None
        return order[~held].to(device), order[held].to(device)

    @property
    def _start(self) -> Tensor:
        """What an expert that sees nothing would answer, ``(K,)``."""
        if self._kind == "regression":
            return torch.zeros(1)
        return torch.as_tensor(np.atleast_1d(self.base_), dtype=torch.float32)

    def _sum_up(self, table: Table, weight: Array) -> None:
        """Remember what :meth:`explain_global` tells about training rows."""
        raise NotImplementedError

    def _later_target(self, target: Array) -> Array:
        """What the networks learn of more rows, as the first call of ``partial_fit`` set it."""
        return target

    def _check_fitted(self) -> None:
        check_is_fitted(self, "networks_")

    # --- Values --------------------------------------------------------------------------------

    def _values(self, table: Table) -> Tensor:
        """v of every expert, in log-odds or like y: ``(rows, H)`` or ``(rows, H, K)``, float64."""
        codes = self.encoder_.codes(table)
        values = torch.stack([network.values(codes) for network in self.networks_])
        return self._in_units(values.mean(0))

    def _answer(self, x: Any) -> Array:
        """v of the expert that sees all: ``(rows,)`` or ``(rows, K)``."""
        self._check_fitted()
        values = self._values(self._read(x, reset=False))
        answer: Array = values[:, top_expert(self.family_)].numpy()
        return answer


def _merged(table: Table, target: Array, weight: Array) -> tuple[Table, Array, Array]:
    """Each row once, in an order that depends on the rows alone; weights of equal ones added."""
    keys = [
        np.unique([str(value) for value in as_categories(column)], return_inverse=True)[1]
        if kind == CATEGORIES
        else np.where(np.isnan(column), -np.finfo(np.float64).max, column)
        for kind, column in zip(table.kinds, table.columns, strict=True)
    ]
    stacked = np.column_stack([*keys, target]).astype(np.float64)
    order = np.lexsort(stacked.T)
    ordered = stacked[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    total = np.bincount(np.cumsum(new) - 1, weight[order])
    rows = order[new]
    return table.taken(rows), target[rows], total


def checked_mapping(value: Any, name: str) -> Mapping[Any, float]:
    """``value``, a dict.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be None, 'balanced' or a dict, got {value!r}")
    return value
