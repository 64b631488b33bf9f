"""Training the MovieLens model: ours, a black box, and a list of ``nn.Linear`` an expert.

Random ids and labels of MovieLens-1M's sizes. Each model is trained as the experiment trains it:
features gathered by id, GEM loss (the black box: cross-entropy), backward, fused Adam.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.networks.training import BLACK_BOX, OURS, PAPER, Make, Schedule, Subject, Trainer
from bench.rivals.paper_style_mlp import PaperStyleNCF
from maskmoe_kernels import gem_loss
from maskmoe_kernels.experiments.movielens.evaluate import CONFIDENCE
from maskmoe_kernels.models import NCF, InterpretableNCF, NCFSizes

NOTES = {
    OURS: "InterpretableNCF, packed layers",
    BLACK_BOX: "NCF of torch's own layers: another model, with one logit",
    PAPER: "the same model and weights as ours, one nn.Linear an expert over detached sources",
}
#: Of the GEM loss, as in the experiment.
OPTIONS: dict[str, Any] = {
    "confidence": CONFIDENCE,
    "weighting": "deselection",
    "normalize": "expert",
}
SMOKE = Schedule((64,), rounds=3, compile=False, seconds=0.02, sizes=NCFSizes(50, 40))


class Data:
    """Random samples, and the features of every user and item, on a device."""

    def __init__(self, sizes: NCFSizes, batch: int, device: str, steps: int = 16) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=generator).to(device)

        counts = [count for count, _ in sizes.categories.values()]
        self.codes = torch.stack([draw(count, sizes.num_users) for count in counts], 1)
        self.numeric = torch.randn(sizes.num_items, sizes.num_numeric, generator=generator)
        self.numeric = self.numeric.to(device)
        self.batch = batch
        self.users, self.items = (
            draw(count, steps * batch) for count in (sizes.num_users, sizes.num_items)
        )
        self.target = draw(2, steps * batch).float()

    def step(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Users, items and labels of step ``k``; they repeat."""
        start = k * self.batch % len(self.users)
        span = slice(start, start + self.batch)
        return self.users[span], self.items[span], self.target[span]


def build(name: str, sizes: NCFSizes, backend: str | None = None) -> nn.Module:
    """One of ``NOTES``, from the same seed; ours on ``backend``."""
    torch.manual_seed(0)
    if name == BLACK_BOX:
        return NCF(sizes)
    ours = InterpretableNCF(sizes, backend=backend)
    return ours if name == OURS else PaperStyleNCF(ours)


def loss_of(model: nn.Module, data: Data) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Loss of users, items and labels, features gathered by id, as the experiment computes it."""
    family = getattr(model, "family", None)

    def loss(users: Tensor, items: Tensor, target: Tensor) -> Tensor:
        inputs = (users, items, data.codes[users], data.numeric[items])
        if isinstance(model, InterpretableNCF):
            return model.gem_loss(*inputs, target, **OPTIONS)
        logits = model(*inputs)
        if family is None:
            return F.binary_cross_entropy_with_logits(logits[:, 0].float(), target)
        return gem_loss(logits, target, family, **OPTIONS)

    return loss


def trainer(name: str, data: Data, sizes: NCFSizes, device: str, compiled: bool = False) -> Trainer:
    """A trainer of one of ``NOTES``."""
    model = build(name, sizes).to(device)
    return Trainer(data, model, loss_of(model, data), compiled)


def _prepare(batch: int, schedule: Schedule, device: str) -> Make:
    data = Data(schedule.sizes, batch, device)
    return lambda name, compiled: trainer(name, data, schedule.sizes, device, compiled)


SUBJECT = Subject(
    "Training the MovieLens model", "movielens_training.json", NOTES, (256, 4096), _prepare
)
