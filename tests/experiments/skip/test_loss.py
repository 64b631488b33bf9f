"""The loss of several processes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from maskmoe_kernels.experiments.shared.ranks import Ranks
from maskmoe_kernels.experiments.skip.loss import loss_part
from maskmoe_kernels.experiments.skip.models import build
from maskmoe_kernels.experiments.skip.settings import MODELS
from maskmoe_kernels.models.sessions import SessionExperts, SessionModel
from maskmoe_kernels.ops.selection import gem_loss
from tests.experiments.skip.tiny import TINY, draw_batch, share_of

ALONE = Ranks(torch.device("cpu"))


class Simulated(Ranks):
    """Processes of which one is run, with what all of them would have summed."""

    total: torch.Tensor

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.total, dtype=value.dtype)


class Recording(Ranks):
    """Keeps what is summed."""

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        object.__setattr__(self, "seen", value.detach())
        return value


def _experts() -> SessionExperts:
    model: SessionModel = build(TINY)
    assert isinstance(model, SessionExperts)
    return model


MODEL = _experts()


@pytest.mark.parametrize("normalize", ["none", "sample", "batch"])
@pytest.mark.parametrize("weighting", ["selection", "deselection", "uniform"])
@given(
    cuts=st.lists(st.integers(0, 6), min_size=1, max_size=3).map(sorted),
    seed=st.integers(0, 2**20),
)
@example(cuts=[0], seed=0)  # a process without a session
def test_parts_of_the_loss_average_to_the_whole(
    weighting: str, normalize: str, cuts: list[int], seed: int
) -> None:
    settings = replace(TINY, weighting=weighting, normalize=normalize)
    model = MODEL
    batch = draw_batch(6, seed)
    logits = torch.randn(6, 10, 8, generator=torch.Generator().manual_seed(seed + 1)).double()
    whole = logits.clone().requires_grad_()
    loss_part(model, whole, batch, settings, ALONE).backward()
    edges = [0, *cuts, 6]
    spans = list(pairwise(edges))
    amounts = []
    for low, high in spans:
        recording = Recording(torch.device("cpu"), 0, len(spans))
        loss_part(model, logits[low:high], share_of(batch, low, high), settings, recording)
        amounts.append(recording.seen)
    parts = []
    for low, high in spans:
        ranks = Simulated(torch.device("cpu"), 0, len(spans))
        object.__setattr__(ranks, "total", torch.stack(amounts).sum())
        own = logits[low:high].clone().requires_grad_()
        loss_part(model, own, share_of(batch, low, high), settings, ranks).backward()
        parts.append(own.grad / len(spans))
    torch.testing.assert_close(torch.cat(parts), whole.grad, rtol=1e-9, atol=1e-12)


def test_one_process_has_the_loss_of_its_model() -> None:
    batch = draw_batch(5, 3)
    real = ~batch.second_padding
    logits = torch.randn(5, 10, 8)
    expected = gem_loss(logits, batch.target, MODEL.family, "abs", "deselection", "batch", real)
    torch.testing.assert_close(loss_part(MODEL, logits, batch, TINY, ALONE), expected)
    black = replace(TINY, model=MODELS[2])
    expected = F.binary_cross_entropy_with_logits(logits[..., 0][real], batch.target[real])
    found = loss_part(build(black), logits[..., 0], batch, black, ALONE)
    torch.testing.assert_close(found, expected)
