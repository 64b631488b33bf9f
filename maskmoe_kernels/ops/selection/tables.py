"""What the kernels read of a family: who is a proper subset of whom, as lists and rows of flags."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from maskmoe_kernels._compat import constant_in_trace
from maskmoe_kernels.layout.subsets import SubsetFamily

_NAMES = ("subset_experts", "supersets_of", "superset_experts", "subsets_of", "has_superset")


def table(family: SubsetFamily, name: str, device: torch.device) -> Tensor:
    """A table of ``family`` for the kernels, built once per device.

    ``"subset_experts"``: the experts whose subset lies inside another one's, ``(count,)`` int32;
    row n of ``"supersets_of"`` says inside whose, ``(count, H)`` uint8. ``"superset_experts"``: the
    experts that have a subset inside theirs; row n of ``"subsets_of"`` says whose.
    ``"has_superset"``: is expert j one of the first kind? ``(H,)`` bool.
    """
    _keep_tables(family, device)
    return family.caches.tables[f"fused {name}", device]


@constant_in_trace
def _keep_tables(family: SubsetFamily, device: torch.device) -> None:
    # A trace finds them then, as it finds any tensor: it could not build them.
    for name in _NAMES:
        family.caches.table(f"fused {name}", device, partial(_build, family, name))


def _build(family: SubsetFamily, name: str) -> Tensor:
    is_proper_subset = family.strict.T  # entry (j, i): is S_j a proper subset of S_i?
    if name == "has_superset":
        return is_proper_subset.any(1)
    of_subsets = name in ("subset_experts", "supersets_of")
    related = is_proper_subset if of_subsets else is_proper_subset.T
    listed = related.any(1)
    if name in ("subset_experts", "superset_experts"):
        return listed.nonzero().flatten().to(torch.int32)
    return related[listed].to(torch.uint8).contiguous()
