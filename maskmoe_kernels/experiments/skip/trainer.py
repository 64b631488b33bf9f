"""How skip prediction trains: its pace, and its sessions as a source of batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from maskmoe_kernels.experiments.shared import trainer
from maskmoe_kernels.experiments.skip.data.session_features import SessionBatch
from maskmoe_kernels.experiments.skip.data.sessions import SessionLoader

MONITOR = "Acc"


@dataclass(frozen=True)
class Pace(trainer.Pace):
    """The pace of skip prediction; see :class:`trainer.Pace`."""

    patience: int = 4
    learning_rate: float = 1e-4
    plateau: int | None = 1
    clip: float | None = 1.0
    save_every: int | None = 500


class SessionSource:
    """Batches of a loader on a device, in epochs of a pass or of so many steps.

    Args:
        loader: Of training batches.
        device: Where the batches go.
        steps: Steps of an epoch; the next epoch goes on in the data where this one ends. ``None``:
            an epoch is a pass.
    """

    unit = "sessions"
    by_sample = False

    def __init__(self, loader: SessionLoader, device: torch.device, steps: int | None = None):
        self.loader, self.device, self.steps = loader, device, steps

    def epoch(self, number: int, done: int) -> tuple[int, Iterator[SessionBatch]]:
        return self.steps or len(self.loader), self._rest(done)

    def _rest(self, done: int) -> Iterator[SessionBatch]:
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
