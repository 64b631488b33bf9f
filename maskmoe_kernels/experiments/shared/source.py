"""Sources of training batches, with a position that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

from torch import Tensor

Batch = TypeVar("Batch")


class Source(Protocol[Batch]):
    """Where the batches of training come from.

    Attributes:
        unit: What a batch consists of, in the plural, for speeds.
        by_sample: Whether the training loss of an epoch is the mean over samples (then all
            processes have equally many a step); otherwise it is the mean over steps.
    """

    unit: str
    by_sample: bool

    def epoch(self, number: int, done: int) -> tuple[int, Iterable[Batch]]:
        """Steps of an epoch (from 1), and its batches without the first ``done``."""

    def samples(self, batch: Batch) -> int:
        """How many samples a batch holds."""

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, in plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; raises DataError if it is of another source."""


class TensorSource:
    """Epochs that are tensors of samples, cut into batches in order.

    Args:
        epoch_of: Epoch number (from 1) to tensors of all its samples. It must return the same
            tensors for the same number, for a run that is resumed.
        batch_size: Samples a step.
    """

    unit = "samples"
    by_sample = True

    def __init__(self, epoch_of: Callable[[int], tuple[Tensor, ...]], batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.epoch_of, self.batch_size = epoch_of, batch_size

    def epoch(self, number: int, done: int) -> tuple[int, Iterator[tuple[Tensor, ...]]]:
        parts, size = self.epoch_of(number), self.batch_size
        starts = range(0, len(parts[0]), size)
        batches = (tuple(part[k : k + size] for part in parts) for k in starts[done:])
        return len(starts), batches

    def samples(self, batch: tuple[Tensor, ...]) -> int:
        return len(batch[0])

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
