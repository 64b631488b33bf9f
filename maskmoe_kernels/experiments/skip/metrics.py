"""Metrics of skip prediction: judgements track by track, in sessions of any length."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(eq=False)
class SkipTally:
    """Sums over sessions from which Acc, Acc@1 and MAA follow; tallies of parts may be added.

    Attributes:
        sums: Tracks, tracks judged rightly, sessions, first tracks judged rightly, and the sum of
            the sessions' average accuracies; ``(5,)`` float64.
    """

    sums: Tensor = field(default_factory=lambda: torch.zeros(5, dtype=torch.float64))

    def add(self, right: Tensor, real: Tensor) -> None:
        """Count a batch. A session without a track counts for nothing.

        Args:
            right: Where the judgement is right, ``(B, T)`` bool.
            real: Where there is a track, ``(B, T)`` bool; its order is that of the columns.
        Raises:
            ValueError: Shapes or types that do not fit.
        """
        if (
            right.shape != real.shape
            or right.ndim != 2
            or {right.dtype, real.dtype} != {torch.bool}
        ):
            raise ValueError(
                f"expected right and real (B, T) bool, got {tuple(right.shape)} {right.dtype} and "
                f"{tuple(real.shape)} {real.dtype}"
            )
        hits = (right & real).double()
        so_far = real.cumsum(1)
        length = real.sum(1)
        # acc(j) L(j): where track j is right, the accuracy over tracks 1..j.
        gains = (hits * hits.cumsum(1) / so_far.clamp(min=1)).sum(1) / length.clamp(min=1)
        first = hits * (so_far == 1)
        parts = (length.sum(), hits.sum(), (length > 0).sum(), first.sum(), gains.sum())
        self.sums = self.sums.to(right.device) + torch.stack([p.double() for p in parts])

    def metrics(self) -> dict[str, float]:
        """Acc over tracks; Acc@1 over first tracks; MAA, the mean over sessions of AA.

        AA = (1 / T) sum_j acc(j) L(j) of a session of T tracks (section 4.3.1).

        Raises:
            ValueError: No track was counted.
        """
        tracks, right, sessions, first, gains = self.sums.tolist()
        if not tracks:
            raise ValueError("no track was counted; add a batch with at least one")
        return {"Acc": right / tracks, "Acc@1": first / sessions, "MAA": gains / sessions}
