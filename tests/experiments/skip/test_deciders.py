"""Which experts see a cause, and counts of the experts that decide."""

from __future__ import annotations

import pytest
import torch

from maskmoe_kernels.experiments.skip.deciders import Deciders, sees_cause
from maskmoe_kernels.experiments.skip.generator.causes import CAUSES
from maskmoe_kernels.layout.families import skip_sessions

FAMILY = skip_sessions()[0]


def test_who_sees_which_cause_and_who_is_the_smallest() -> None:
    sees, smallest = sees_cause(FAMILY)
    found = {
        name: (
            {FAMILY.names[i] for i in row.nonzero().flatten().tolist()},
            {FAMILY.names[i] for i in least.nonzero().flatten().tolist()},
        )
        for name, row, least in zip(CAUSES, sees, smallest, strict=True)
    }
    big = "context+interaction+popularity"
    assert found["persistence"] == (
        {"interaction", "context+interaction", big, "all"}, {"interaction"},
    )  # fmt: skip
    assert found["music"] == ({"music", "popularity+music", "all"}, {"music"})
    assert found["context+interaction"] == (
        {"context+interaction", big, "all"}, {"context+interaction"},
    )  # fmt: skip
    assert found["popularity+music"] == ({"popularity+music", "all"}, {"popularity+music"})
    assert found["chance"] == (set(FAMILY.names), {"context", "interaction", "popularity", "music"})


def test_deciders_by_hand() -> None:
    names = FAMILY.names
    # Two sessions of three tracks, the last of them padding.
    top = [["interaction", "all", "music"], ["music", "context", "all"]]
    attribution = torch.full((2, 3, 8), 0.05)
    for b, row in enumerate(top):
        for t, name in enumerate(row):
            attribution[b, t, names.index(name)] = 0.65
    real = torch.tensor([[True, True, True], [True, True, False]])
    cause = torch.tensor(
        [[CAUSES.index(n) for n in row] for row in
         (["persistence", "persistence", "popularity"], ["music", "chance", "music"])]
    )  # fmt: skip
    decisive = torch.tensor([[True, True, True], [True, False, True]])
    deciders = Deciders(FAMILY)
    deciders.add(attribution[:1], real[:1], (cause[:1], decisive[:1]))
    deciders.add(attribution[1:], real[1:], (cause[1:], decisive[1:]))
    report = deciders.report()
    assert report["decided"] == {
        **dict.fromkeys(names, 0.0), "interaction": 0.2, "all": 0.2, "music": 0.4, "context": 0.2,
    }  # fmt: skip
    assert report["mean_attribution"]["music"] == pytest.approx((2 * 0.65 + 3 * 0.05) / 5)
    # Of the four decisive tracks three are decided by one who sees the cause, two by the smallest.
    assert {k: report["decisive"][k] for k in ("tracks", "sees", "smallest")} == {
        "tracks": 4, "sees": 0.75, "smallest": 0.5,
    }  # fmt: skip
    assert report["decisive"]["causes"]["persistence"]["smallest"] == 0.5
    assert report["decisive"]["causes"]["popularity"]["sees"] == 0.0
