"""The pace of training of skip prediction."""

from __future__ import annotations

from dataclasses import dataclass

from maskmoe_kernels.experiments.shared import trainer

#: The validation metric that chooses the best epoch.
MONITOR = "Acc"


@dataclass(frozen=True)
class Pace(trainer.Pace):
    """The pace of training, with the defaults of skip prediction; see :class:`trainer.Pace`."""

    patience: int = 4
    learning_rate: float = 1e-4
    plateau: int | None = 1
    clip: float | None = 1.0
    save_every: int | None = 500
