"""Generated tracks follow the statistics of the real ones."""

from __future__ import annotations

import numpy as np

from maskmoe_kernels.experiments.skip.generator import calibration
from maskmoe_kernels.experiments.skip.generator.catalogue import Catalogue, random_ids
from maskmoe_kernels.experiments.skip.generator.settings import FEWEST_TRACKS


def test_tracks_follow_the_counts(catalogue: Catalogue) -> None:
    levels = [0.1, 0.25, 0.5, 0.75, 0.9]
    at = [calibration.LEVELS.index(level) for level in levels]
    for name, expected in calibration.QUANTILES.items():
        values = catalogue.features[name]
        for level, i in zip(levels, at, strict=True):
            # Deviation of the share below a quantile: 0.0035. Years are whole, so many tie.
            below, upto = (values < expected[i]).mean(), (values <= expected[i] + 1e-9).mean()
            assert below - 0.02 < level < upto + 0.02, (name, level)
    assert abs(catalogue.features["mode"].mean() - calibration.MAJOR) < 0.02
    assert np.corrcoef(catalogue.features["energy"], catalogue.features["loudness"])[0, 1] > 0.5
    assert abs(catalogue.style.std() - 1) < 0.02


def test_kinds_are_there_at_the_fewest_tracks() -> None:
    for seed in range(20):
        kinds = Catalogue.draw(FEWEST_TRACKS, seed).kinds
        assert min(len(rows) for rows in kinds.values()) > 0


def test_ids() -> None:
    ids = random_ids(np.random.default_rng(0), "7_", 500).to_pylist()
    assert len(set(ids)) == 500
    assert all(len(name) == 38 and name[:2] == "7_" for name in ids)
    assert all(name[k] == "-" for name in ids for k in (10, 15, 20, 25))
    assert set("".join(ids)) == set("0123456789abcdef-_")
