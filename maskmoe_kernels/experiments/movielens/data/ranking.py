"""The MovieLens ranking task: features on a device, and one positive among 99 negatives."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from maskmoe_kernels.experiments.movielens.data.fixed_negatives import read_fixed_negatives
from maskmoe_kernels.experiments.movielens.data.negatives import (
    draw_negatives,
    sample_training_pairs,
)
from maskmoe_kernels.experiments.movielens.data.split import Split, leave_one_out
from maskmoe_kernels.experiments.movielens.data.tables import MovieLens
from maskmoe_kernels.experiments.movielens.metrics import hit_rate, leave_one_out_ranks, ndcg
from maskmoe_kernels.models import NCFSizes


class Features:
    """What the models read of users and movies, on a device.

    Attributes:
        data: The tables.
        codes: Sex, age and occupation of each user, ``(U, 3)`` int64.
        numeric: Standardised year and genre flags of each movie, ``(I, 19)``.
    """

    def __init__(self, data: MovieLens, device: str = "cpu") -> None:
        self.data = data
        self.device = torch.device(device)
        self.codes = torch.stack([data.sex, data.age, data.occupation], 1).to(self.device)
        year = data.year.double()
        rated = year[data.rated_items]
        deviation = rated.std(correction=min(1, len(rated) - 1))
        # The deviation is 0 if all movies are of one year.
        standard = ((year - rated.mean()) / (deviation if deviation > 0 else 1)).float()
        self.numeric = torch.cat([standard[:, None], data.genres], 1).to(self.device)

    @property
    def sizes(self) -> NCFSizes:
        """Sizes of the models for this data."""
        return NCFSizes(self.data.num_users, self.data.num_items, num_numeric=self.numeric.shape[1])

    def logits(self, model: nn.Module, users: Tensor, items: Tensor) -> Tensor:
        """Logits of user and item rows of equal shape, ``(*, H)``."""
        out: Tensor = model(*self.inputs(users, items))
        return out

    def inputs(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the models take: rows, categories and numbers of users and items."""
        return users, items, self.codes[users], self.numeric[items]


class Task(Features):
    """Features, split, and the lists to rank.

    Args:
        data: The tables.
        seed: Of the validation items and the drawn negatives.
        negatives: File of fixed test negatives; ``None`` draws 99 per user.
        device: Where features and training samples lie.

    Attributes:
        split: Leave-one-out split.
        fixed_negatives: Whether the test negatives come from a file.
        validation_lists: Validation item, then 99 drawn negatives, ``(U, 100)`` int64.
        test_lists: Test item, then its negatives, ``(U, 100)`` int64.
    """

    def __init__(
        self, data: MovieLens, seed: int, negatives: Path | None, device: str = "cpu"
    ) -> None:
        super().__init__(data, device)
        self.split: Split = leave_one_out(data, seed)
        self.fixed_negatives = negatives is not None
        drawn = draw_negatives(data, self.split, seed)
        test = (
            draw_negatives(data, self.split, seed + 1)
            if negatives is None
            else read_fixed_negatives(negatives, data, self.split)
        )
        self.validation_lists = torch.cat([self.split.validation[:, None], drawn], 1)
        self.test_lists = torch.cat([self.split.test[:, None], test], 1)

    @torch.inference_mode()
    def list_logits(self, model: nn.Module, lists: Tensor, chunk: int = 256) -> Tensor:
        """Logits of ranking lists ``(U, K)``: ``(U, K, H)`` on the CPU."""
        parts = []
        for start in range(0, len(lists), chunk):
            items = lists[start : start + chunk].to(self.device)
            users = torch.arange(start, start + len(items), device=self.device)
            parts.append(self.logits(model, users[:, None].expand_as(items), items).cpu())
        return torch.cat(parts)

    def ranking(self, scores: Tensor, lists: Tensor) -> dict[str, float]:
        """HR@10 and NDCG@10 of scores ``(U, K)``, the positive first."""
        # Some published lists hold the positive among its own negatives.
        same = lists[:, 1:] == lists[:, :1]
        ranks = leave_one_out_ranks(scores[:, 0], scores[:, 1:], same)
        return {"HR@10": hit_rate(ranks), "NDCG@10": ndcg(ranks)}

    def epoch(self, seed: int, number: int) -> tuple[Tensor, ...]:
        """Users, items and targets of epoch ``number``: 4 fresh negatives per positive."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        samples = sample_training_pairs(
            self.split,
            self.split.interacted_train,
            self.data.rated_items,
            generator=generator,
        )
        return tuple(part.to(self.device) for part in samples)
