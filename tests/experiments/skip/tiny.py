"""A tiny model and its pace, and random batches."""

from __future__ import annotations

import torch

from maskmoe_kernels.experiments.skip.data.features import SessionBatch
from maskmoe_kernels.experiments.skip.pace import Pace
from maskmoe_kernels.experiments.skip.settings import MODELS, Settings

TINY = Settings(MODELS[0], width=3, layers=1, batch_size=48)
#: 2 epochs of 6 or so steps each, with a checkpoint after every second step.
PACE = Pace(epochs=2, learning_rate=1e-3, save_every=2)


def draw_batch(sessions: int, seed: int) -> SessionBatch:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(sessions, 10, 73, generator=generator)
    second = torch.randn(sessions, 10, 31, generator=generator)
    target = torch.randint(2, (sessions, 10), generator=generator).float()
    lengths = torch.randint(5, 11, (2, sessions, 1), generator=generator)
    paddings = torch.arange(10) >= lengths
    ids = [str(k) for k in range(sessions)]
    return SessionBatch(first, second, target, paddings[0], paddings[1], ids)


def share_of(batch: SessionBatch, low: int, high: int) -> SessionBatch:
    tensors = {name: tensor[low:high] for name, tensor in batch._tensors().items()}
    return SessionBatch(**tensors, session_ids=batch.session_ids[low:high])
