"""Sessions a second of training the skip models: ours with 8 experts x 16, torch's of width 128.

``python -m bench train --model skip``. Random sessions of 10 to 20 tracks, padded as the stream
pads them; each model is trained as the experiment trains it: GEM loss (the black box:
cross-entropy), backward, gradients clipped by norm, fused Adam.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.networks.training import BLACK_BOX, OURS, Make, Plan, Subject, Trainer
from maskmoe_kernels.experiments.shared.ranks import Ranks
from maskmoe_kernels.experiments.skip.data.features import HALF, SessionBatch
from maskmoe_kernels.experiments.skip.loss import loss_part
from maskmoe_kernels.experiments.skip.models import build, logits_of
from maskmoe_kernels.experiments.skip.settings import Settings
from maskmoe_kernels.models.sessions import SessionModel

SETTINGS = {
    OURS: Settings("interpretable-transformer"),
    BLACK_BOX: Settings("black-box-transformer"),
}
NOTES = {
    OURS: "InterpretableTransformer, 8 experts x 16, 3 + 3 blocks",
    BLACK_BOX: "Transformer of torch's own modules, width 128, one logit: another model",
}
SMOKE = Plan((4,), rounds=3, compile=False, seconds=0.02)


class Data:
    """Random sessions on a device, over and over."""

    def __init__(self, batch: int, device: str, steps: int = 8) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batch = batch
        self._steps = []
        for _ in range(steps):
            length = torch.randint(10, 21, (batch, 1), generator=generator)
            paddings = [torch.arange(HALF) >= half for half in (length // 2, length - length // 2)]
            halves = [
                torch.randn(batch, HALF, width, generator=generator).masked_fill(p[..., None], 0)
                for width, p in zip((73, 31), paddings, strict=True)
            ]
            target = torch.randint(2, (batch, HALF), generator=generator).float()
            parts = (*halves, target.masked_fill(paddings[1], 0), *paddings)
            self._steps.append(tuple(part.to(device) for part in parts))

    def step(self, k: int) -> tuple[Tensor, ...]:
        """The tensors of a :class:`SessionBatch`, in its order."""
        return self._steps[k % len(self._steps)]


class SkipTrainer(Trainer):
    """One skip model in training; see :class:`Trainer`."""

    def __init__(self, name: str, data: Data, device: str, compiled: bool) -> None:
        model = build(SETTINGS[name]).to(device)
        self.start(name, data, model, loss_of(name, model, device), device, compiled, clip=1.0)


def loss_of(name: str, model: SessionModel, device: str) -> Callable[..., Tensor]:
    """Loss of a batch's tensors, as the experiment computes it."""
    settings, alone = SETTINGS[name], Ranks(torch.device(device))

    def loss(*tensors: Tensor) -> Tensor:
        batch = SessionBatch(*tensors, session_ids=[])
        return loss_part(model, logits_of(model, batch, settings), batch, settings, alone)

    return loss


def _prepare(batch: int, plan: Plan, device: str) -> Make:
    data = Data(batch, device)
    return lambda name, compiled: SkipTrainer(name, data, device, compiled)


SUBJECT = Subject("Training the skip models", "skip_training.json", NOTES, (128,), _prepare)
