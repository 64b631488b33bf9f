"""The methods of an estimator that learn from a stream, and from more than memory holds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import numpy as np
import torch
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_consistent_length, column_or_1d
from torch import Tensor

from maskmoe_kernels.estimators.base import FEW, Estimator
from maskmoe_kernels.estimators.batches import Batch, Drawn, drawn_from, passes_over
from maskmoe_kernels.estimators.linear_start import start_linear
from maskmoe_kernels.estimators.tables import Array, Table
from maskmoe_kernels.estimators.training import Samples, optimizer_of, run_epoch

#: Rows that a first pass over batches draws.
_DRAWN = 100_000


class Streamed(Estimator):
    """An estimator to which rows come in parts."""

    _known: Array | None
    _optimizers: list[torch.optim.Optimizer]

    def fit_batches(self, batches: Any, target: str | None = None) -> Self:
        """Learn from a table that is larger than memory, batch by batch.

        A first pass draws up to 100,000 rows, to which columns, experts and the start are fitted,
        and of which the rows for early stopping are held out; the next ones train on all others. At
        any time, the drawn rows and one batch are in memory.

        Args:
            batches: ``(X, y)`` or ``(X, y, sample_weight)`` one after the other: a list of them, or
                a function that returns an iterator over them and is called for every pass. Or the
                path of a folder of Parquet files, or of one file.
            target: The column of the files that holds y.

        Raises:
            ValueError: As :meth:`fit`, with the number of the batch; or batches that come only
                once, or that differ from pass to pass.
            FileNotFoundError: There is nothing at the path.
        """
        self._check_parameters()
        if getattr(self, "class_weight", None) == "balanced":
            raise ValueError(
                "class_weight='balanced' needs all labels at once; pass a dict of class to weight"
            )
        begin_pass = passes_over(batches, target)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        found: list[Array] = []
        random = np.random.default_rng(seed)
        drawn = drawn_from(self._first_pass(begin_pass(), found), _DRAWN, random)
        self._known = np.unique(np.concatenate(found)) if found else None
        try:
            return self._fit_drawn(drawn, begin_pass)
        finally:
            del self._known

    def _first_pass(
        self, batches: Iterable[Batch], labels: list[Array]
    ) -> Iterator[tuple[Table, Array, Array]]:
        """Batches as tables; the different labels of each go to ``labels``."""
        for k, batch in enumerate(batches):
            with _in_batch(k):
                table = self._read(batch.x, reset=k == 0)
                weight = self._weight(batch.weight, table.rows)
                y = column_or_1d(batch.y)
                check_consistent_length(weight, y)
                if self.__sklearn_tags__().estimator_type == "classifier":
                    labels.append(np.unique(y[weight > 0]))
            yield table, y, weight

    def _fit_drawn(self, drawn: Drawn, begin_pass: Callable[[], Iterator[Batch]]) -> Self:
        table = drawn.table
        if table.rows < 2:
            raise ValueError(
                f"fit_batches needs at least 2 rows of a weight above 0, got {table.rows}"
            )
        target, weight = self._encode_target(drawn.y, table.rows, drawn.weight)
        target = self._learn_target(target, weight)
        few = self.early_stopping == "auto" and table.rows < FEW
        out = 0 if few or not self.early_stopping else int(self.validation_fraction * table.rows)
        rows = np.arange(out, table.rows)
        self._begin(table.taken(rows), target[rows], weight[rows])
        samples = self._samples(table, target, weight)
        bags, device = len(self.networks_), samples.target.device
        first = torch.arange(out, device=device) if out else None
        split = torch.from_numpy(rows).to(device), first
        self.ridge_ = start_linear(self.networks_, samples, [split] * bags, self._kind, self._start)
        held = None if first is None else samples.taken(first)
        not_seen = np.sort(drawn.number[:out])

        def chunks() -> Iterator[tuple[Samples, list[Tensor]]]:
            start = 0
            for k, batch in enumerate(begin_pass()):
                with _in_batch(k):
                    part, count = self._later_samples(batch, start, not_seen)
                start += count
                if part is not None:
                    yield part, [torch.arange(len(part.target), device=device)] * bags
            if start != drawn.total:
                raise ValueError(
                    f"the batches had {drawn.total} rows in the first pass and {start} in a later "
                    "one; every pass must give the same rows in the same order"
                )

        self._train(chunks, drawn.total - out, [held] * bags)
        self._sum_up(table.taken(rows), weight[rows])
        return self

    def _later_samples(
        self, batch: Batch, start: int, not_seen: Array
    ) -> tuple[Samples | None, int]:
        """The rows of a batch to be trained on, and how many rows it has.

        Args:
            batch: See there.
            start: Rows before it.
            not_seen: Numbers of the rows that are held out, ascending.
        """
        table = self._read(batch.x, reset=False)
        weight = self._weight(batch.weight, table.rows)
        target, weight = self._encode_target(batch.y, table.rows, weight)
        keep = (weight > 0) & ~np.isin(start + np.arange(table.rows), not_seen)
        if not keep.any():
            return None, table.rows
        target = self._later_target(target[keep])
        return self._samples(table.taken(keep), target, weight[keep]), table.rows

    def _partial_fit(self, x: Any, y: Any, sample_weight: Any, first: bool) -> Self:
        self._check_parameters()
        if first:
            table, target, weight = self._prepared(x, y, sample_weight)
            self._begin(table, target, weight)
        else:
            table = self._read(x, reset=False)
            weight = self._weight(sample_weight, table.rows)
            target, weight = self._encode_target(y, table.rows, weight)
            counts = weight > 0
            table, target, weight = table.taken(counts), target[counts], weight[counts]
            target = self._later_target(target)
        if not self._optimizers:
            self._optimizers = [optimizer_of(network, self._pace()) for network in self.networks_]
        samples = self._samples(table, target, weight)
        for k, (network, optimizer) in enumerate(
            zip(self.networks_, self._optimizers, strict=True)
        ):
            generator = torch.Generator().manual_seed(self._seed + k)
            rows = torch.arange(len(target), device=samples.target.device)
            todo = samples, rows, self._kind, self.batch_size, generator
            run_epoch(network, optimizer, *todo)
            network.settle()
        self._sum_up(table, weight)
        return self


@contextlib.contextmanager
def _in_batch(k: int) -> Iterator[None]:
    """Name the batch in what is wrong with it."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(f"batch {k}: {error}") from None
