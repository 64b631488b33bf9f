"""The table of tracks: normalised features, and problems of rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.skip.data import tracks
from maskmoe_kernels.experiments.skip.data.columns import TRACK_FEATURES
from maskmoe_kernels.experiments.skip.data.ids import hash_ids
from maskmoe_kernels.experiments.skip.data.prepare import prepare
from tests.experiments.skip.data.files import (
    edit,
    manifest,
    put,
)


def test_track_statistics(source: Path, tmp_path: Path) -> None:
    prepare([source], tmp_path)
    statistics = manifest(tmp_path)["statistics"]
    assert list(statistics) == list(TRACK_FEATURES)
    raw = pq.read_table(tmp_path / "tracks" / "tracks.parquet")
    normal = np.load(tmp_path / "tracks" / "features.npy")
    assert normal.dtype == np.float32
    for name, transform in (("tempo", np.asarray), ("duration", np.log)):
        values = transform(raw[name].to_numpy().astype(np.float64))
        assert statistics[name]["mean"] == pytest.approx(values.mean())
        assert statistics[name]["std"] == pytest.approx(values.std())
        expected = (values - values.mean()) / values.std()
        np.testing.assert_allclose(normal[:, TRACK_FEATURES.index(name)], expected, atol=1e-5)
    assert (np.diff(np.load(tmp_path / "tracks" / "hash.npy").astype(object)) > 0).all()
    assert np.array_equal(np.load(tmp_path / "tracks" / "hash.npy"), hash_ids(raw["track_id"]))


def test_constant_and_extreme_features_are_normalised() -> None:
    features = np.ones((1000, 29))
    features[0] = [100_000, 2100, 100, *[1.0] * 26]
    features[1:, 0] = np.linspace(100, 101, 999)
    columns = dict(zip(TRACK_FEATURES, features.T, strict=True))
    normal, _ = tracks.normalise(columns)
    assert np.isfinite(normal).all()
    assert normal[0, 0] == tracks.CLIP
    assert not normal[:, 5].any()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("tempo", "fast", r"a number from 0 to 1000 in column tempo, got 'fast'"),
        ("tempo", "nan", r"a number from 0 to 1000 in column tempo, got"),
        ("acousticness", "1.5", r"a number from 0 to 1 in column acousticness, got 1\.5"),
        ("mode", "dorian", r"one of minor, major in column mode, got 'dorian'"),
        ("release_year", "1e3", r"a whole number from 1850 to 2100 .*, got '1e3'"),
    ],
)
def test_bad_track(folder: Path, tmp_path: Path, column: str, value: str, message: str) -> None:
    edit(folder / "tf_0.csv", put(2, column, value))
    found = prepare([folder], tmp_path / "out")
    assert found.tracks == 1_999
    with pytest.raises(DataError, match=rf"tf_0\.csv, line 2: expected {message}"):
        prepare([folder], tmp_path / "out", strict=True)


def test_duplicate_track(folder: Path, tmp_path: Path) -> None:
    edit(folder / "tf_0.csv", lambda t: t.append([t[1][0], *t[2][1:]]))
    found = prepare([folder], tmp_path / "out")
    assert (found.tracks, found.counts) == (2_000, {"duplicate track": 1})
    with pytest.raises(DataError, match=r"tf_0\.csv, line 2002: expected each track once, got t_"):
        prepare([folder], tmp_path / "out", strict=True)
