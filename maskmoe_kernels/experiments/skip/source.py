"""The sessions of a loader as batches of training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from maskmoe_kernels.experiments.skip.data.features import SessionBatch
from maskmoe_kernels.experiments.skip.data.sessions import SessionLoader


class SessionSource:
    """The batches of a loader on a device; see :class:`Source`.

    Args:
        loader: Where the batches come from.
        device: Where the batches go.
        steps: Steps of an epoch; the next epoch continues in the data where this one ends.
            ``None``: an epoch is one pass over the data.
    """

    unit = "sessions"
    by_sample = False

    def __init__(self, loader: SessionLoader, device: torch.device, steps: int | None = None):
        self.loader, self.device, self.steps = loader, device, steps

    def epoch(self, number: int, done: int) -> tuple[int, Iterator[SessionBatch]]:
        return self.steps or len(self.loader), self._rest(done)

    def _rest(self, done: int) -> Iterator[SessionBatch]:
        """The batches of an epoch of which ``done`` were yielded before."""
        while self.steps is None or done < self.steps:
            for batch in self.loader:
                yield batch.to(self.device, non_blocking=True)
                done += 1
                if done == self.steps:
                    return
            if self.steps is None:
                return

    def samples(self, batch: SessionBatch) -> int:
        return len(batch)

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)
