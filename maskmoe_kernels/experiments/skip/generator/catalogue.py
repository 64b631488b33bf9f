"""Generated tracks: features distributed as in the real data, and the kinds that rules refer to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from maskmoe_kernels.experiments.skip.data.arrays import Array
from maskmoe_kernels.experiments.skip.data.columns import MODES, TRACK_FEATURES
from maskmoe_kernels.experiments.skip.generator import calibration

#: Popularity below the first value is low, above the second one high; see :mod:`.causes`.
POPULARITY_LOW, POPULARITY_HIGH = 91.5, 98.5
#: A style below ``-STYLE_FAR`` is acoustic, above ``STYLE_FAR`` energetic; in between, only a
#: style of an absolute value below ``STYLE_NEAR`` counts as neither.
STYLE_FAR, STYLE_NEAR = 1.0, 0.4
#: A track is instrumental above the first value of instrumentalness, and sung below the second.
INSTRUMENTAL, SUNG = 0.5, 0.25
#: A track is new if released in the first year or later, and old up to the second year.
NEW, OLD = 2014, 2009
#: The kinds of tracks that rules tell apart; the last four are instrumental, by mode and age.
KINDS = (
    "plain", "low", "high", "acoustic", "energetic", "minor old", "minor new", "major old",
    "major new",
)  # fmt: skip
# Correlation of features with the hidden variable that runs from acoustic to energetic.
_LOADINGS = {
    "energy": 0.85, "loudness": 0.8, "acousticness": -0.8, "organism": -0.75, "mechanism": 0.75,
    "beat_strength": 0.5, "acoustic_vector_0": 0.7,
}  # fmt: skip


def random_ids(random: Any, prefix: str, count: int) -> Any:
    """Ids in the form of the official ones: a prefix and a random uuid.

    Args:
        random: numpy's generator.
        prefix: ASCII.
        count: Number of ids.
    Returns:
        pyarrow strings, ``(count,)``.
    """
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)[random.integers(0, 16, (count, 32))]
    dash = np.full((count, 1), ord("-"), np.uint8)
    head = np.tile(np.frombuffer(prefix.encode(), np.uint8), (count, 1))
    parts = [head]
    for low, high in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)):
        parts += [digits[:, low:high], dash]
    text = np.ascontiguousarray(np.concatenate(parts[:-1], 1))
    bounds = np.arange(count + 1, dtype=np.int32) * text.shape[1]
    return pa.StringArray.from_buffers(count, pa.py_buffer(bounds), pa.py_buffer(text))


@dataclass(frozen=True)
class Catalogue:
    """The tracks that sessions play.

    Attributes:
        ids: pyarrow strings, ``(tracks,)``.
        features: Column -> ``(tracks,)``; mode as an index into ``MODES``.
        style: From acoustic (negative) to energetic (positive), with mean 0 and standard
            deviation 1, ``(tracks,)``.
    """

    ids: Any
    features: dict[str, Array]
    style: Array

    @classmethod
    def draw(cls, tracks: int, seed: int) -> Catalogue:
        """Draw tracks whose features follow :mod:`.calibration`; some are correlated by the style.

        Args:
            tracks: Number of tracks.
            seed: Seed, from 0.
        """
        random = np.random.default_rng([seed, 0])
        hidden = random.standard_normal(tracks)
        features: dict[str, Array] = {}
        style = np.zeros(tracks)
        variance = 0.0
        for name in TRACK_FEATURES:
            load = _LOADINGS.get(name, 0.0)
            noise = random.standard_normal(tracks)
            normal = load * hidden + np.sqrt(1 - load**2) * noise
            features[name] = _value(name, normal, random)
            style += load * normal
            variance += load**2 * (1 - load**2)
        style /= np.sqrt(variance + sum(load**2 for load in _LOADINGS.values()) ** 2)
        return cls(random_ids(random, "t_", tracks), features, style)

    @cached_property
    def kinds(self) -> dict[str, Array]:
        """Kind, one of ``KINDS`` -> rows of its tracks. Some tracks are of no kind.

        A track that makes one rule apply is neutral in the features that the other rules look at.
        """
        popularity = self.features["us_popularity_estimate"]
        low, high = popularity < POPULARITY_LOW, popularity > POPULARITY_HIGH
        middle, near = ~low & ~high, np.abs(self.style) < STYLE_NEAR
        sung = self.features["instrumentalness"] < SUNG
        played = self.features["instrumentalness"] > INSTRUMENTAL
        year, major = self.features["release_year"], self.features["mode"] == 1
        found = {
            "plain": middle & near & sung,
            "low": low & near & sung,
            "high": high & near & sung,
            "acoustic": (self.style < -STYLE_FAR) & middle & sung,
            "energetic": (self.style > STYLE_FAR) & middle & sung,
        }
        for mode, in_mode in (("minor", ~major), ("major", major)):
            for age, in_age in (("old", year <= OLD), ("new", year >= NEW)):
                found[f"{mode} {age}"] = middle & near & played & in_mode & in_age
        return {name: mask.nonzero()[0] for name, mask in found.items()}

    def table(self) -> Any:
        """A pyarrow table with the official columns of ``tf_*.csv``."""
        columns = dict(self.features) | {"mode": pa.array(MODES).take(self.features["mode"])}
        return pa.table({"track_id": self.ids} | {name: columns[name] for name in TRACK_FEATURES})


def _value(name: str, normal: Array, random: Any) -> Array:
    """Map standard normal values to values of a feature, monotonically.

    Args:
        name: Of the feature. Mode, key and time signature do not use ``normal``.
        normal: ``(tracks,)``.
        random: numpy's generator.
    """
    if name.startswith("acoustic_vector_"):
        mean, std = calibration.ACOUSTIC_VECTORS[int(name[-1])]
        return np.round(mean + std * normal, 6)
    if name == "mode":
        major: Array = random.random(len(normal)) < calibration.MAJOR
        return major.astype(np.int64)
    if name in ("key", "time_signature"):
        counts = calibration.KEYS if name == "key" else calibration.TIME_SIGNATURES
        return draw(random, counts, len(normal))
    level = _normal_cdf(normal)
    value = np.interp(level, calibration.LEVELS, calibration.QUANTILES[name])
    is_integer = name == "release_year"
    return np.round(value).astype(np.int64) if is_integer else np.round(value, 6)


def draw(random: Any, weights: Any, shape: Any) -> Array:
    """Draw random indices into ``weights``, with probabilities proportional to them.

    Args:
        random: numpy's generator.
        weights: Non-negative, ``(n,)``.
        shape: Shape of the result.
    """
    bounds = np.cumsum(weights) / np.sum(weights)
    index: Array = np.searchsorted(bounds[:-1], random.random(shape), side="right")
    return index


def _normal_cdf(x: Array) -> Array:
    """Cumulative distribution of the normal distribution, from a table: numpy has no erf."""
    grid = np.linspace(-6, 6, 4097)
    density = np.exp(-(grid**2) / 2)
    mass = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    level: Array = np.interp(x, grid, mass / mass[-1])
    return level
