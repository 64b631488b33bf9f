"""Loaders of batches, and their comparison."""

from __future__ import annotations

import torch

from maskmoe_kernels.experiments.skip.data.features import SessionBatch
from maskmoe_kernels.experiments.skip.data.sessions import SessionDataset, SessionLoader
from maskmoe_kernels.experiments.skip.data.shards import Shards

TENSORS = ("first", "second", "target", "first_padding", "second_padding")


def loader(shards: Shards, batch_size: int = 16, workers: int = 0, **kwargs: int) -> SessionLoader:
    dataset = SessionDataset(shards, batch_size, **{"pool": 3, "seed": 7} | kwargs)
    return SessionLoader(dataset, workers=workers)


def assert_equal(a: SessionBatch, b: SessionBatch) -> None:
    assert a.session_ids == b.session_ids
    for name in TENSORS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert getattr(a, name).dtype == getattr(b, name).dtype


def assert_same_batches(a: list[SessionBatch], b: list[SessionBatch]) -> None:
    assert len(a) == len(b) > 0
    for one, other in zip(a, b, strict=True):
        assert_equal(one, other)
