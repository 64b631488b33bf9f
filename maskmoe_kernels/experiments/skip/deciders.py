"""Counts which expert decides on each track, and whether it sees what caused the label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from maskmoe_kernels.experiments.skip.data.columns import MSSD
from maskmoe_kernels.layout.subsets import SubsetFamily

CauseGroups = Mapping[str, frozenset[str]]


class Deciders:
    """Counts of the experts that decide; an expert decides on a track if its share is largest.

    Args:
        family: The subsets of the experts.
        groups: Cause -> the groups that an expert must see to know it.

    Attributes:
        share: Sum of the attributions, ``(H,)`` float64.
        decided: Number of tracks on which each expert decides, ``(H,)`` int64.
        by_cause: The same by cause, over the tracks with a known and decisive cause,
            ``(causes, H)`` int64.
    """

    def __init__(self, family: SubsetFamily, groups: CauseGroups = MSSD.causes) -> None:
        self.family, self.groups = family, groups
        experts = family.num_experts
        self.share = torch.zeros(experts, dtype=torch.float64)
        self.decided = torch.zeros(experts, dtype=torch.int64)
        self.by_cause = torch.zeros(len(groups), experts, dtype=torch.int64)

    def add(
        self, attribution: Tensor, real: Tensor, causes: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Count a batch.

        Args:
            attribution: Share of each expert, ``(B, T, H)``.
            real: Whether there is a track, ``(B, T)`` bool.
            causes: Cause and decisive flag of each track, as :meth:`Causes.of` returns them.
        """
        experts = self.family.num_experts
        top = attribution.argmax(-1)
        self.share += attribution[real].double().sum(0)
        self.decided += torch.bincount(top[real], minlength=experts)
        if causes is not None:
            cause, decisive = causes[0], causes[1] & real
            pairs = cause[decisive] * experts + top[decisive]
            self.by_cause += torch.bincount(pairs, minlength=self.by_cause.numel()).view_as(
                self.by_cause
            )

    def report(self) -> dict[str, Any]:
        """Mean attribution and share of decisions by expert, and statistics by cause, for json."""
        names, tracks = self.family.names, max(int(self.decided.sum()), 1)
        result: dict[str, Any] = {
            "mean_attribution": dict(zip(names, (self.share / tracks).tolist(), strict=True)),
            "decided": dict(zip(names, (self.decided.double() / tracks).tolist(), strict=True)),
        }
        if not self.by_cause.any():
            return result
        sees, smallest = sees_cause(self.family, self.groups)
        causes = {}
        for name, counts, can, least in zip(
            self.groups, self.by_cause, sees, smallest, strict=True
        ):
            if total := int(counts.sum()):
                causes[name] = {
                    "groups": sorted(self.groups[name]),
                    "tracks": total,
                    "sees": int(counts[can].sum()) / total,
                    "smallest": int(counts[least].sum()) / total,
                    "decided": dict(zip(names, (counts.double() / total).tolist(), strict=True)),
                }
        total = int(self.by_cause.sum())
        result["decisive"] = {
            "tracks": total,
            "sees": int(self.by_cause[sees].sum()) / total,
            "smallest": int(self.by_cause[smallest].sum()) / total,
            "causes": causes,
        }
        return result


def sees_cause(family: SubsetFamily, groups: CauseGroups = MSSD.causes) -> tuple[Tensor, Tensor]:
    """Which experts see all groups of each cause, and which are the smallest of these.

    An expert is a smallest one if none of its proper subsets sees all groups of the cause.

    Args:
        family: The subsets of the experts.
        groups: Cause -> the groups that an expert must see to know it.
    Returns:
        Two ``(causes, H)`` bool, causes in the order of ``groups``.
    """
    subsets = [set(seen) for seen in family.subsets.values()]
    sees = torch.tensor([[needed <= s for s in subsets] for needed in groups.values()])
    # strict[i, j]: S_j is a proper subset of S_i. So entry (cause, i) is: does any S_j see it?
    subset_sees = (sees.double() @ family.strict.double().T) > 0
    return sees, sees & ~subset_sees
