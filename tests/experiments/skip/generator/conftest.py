"""One generated chunk and its tracks."""

from __future__ import annotations

import numpy as np
import pytest

from maskmoe_kernels.experiments.skip.generator.catalogue import Catalogue
from maskmoe_kernels.experiments.skip.generator.chunk import draw_chunk
from maskmoe_kernels.experiments.skip.generator.settings import GeneratorSettings

SETTINGS = GeneratorSettings(6_000, seed=1, tracks=20_000, chunk=6_000)


@pytest.fixture(scope="session")
def log() -> dict[str, np.ndarray]:
    """Columns of one chunk, dates and ids left out."""
    table, _ = draw_chunk(SETTINGS, 0)
    names = [name for name in table.column_names if name != "date"]
    return {name: table[name].to_numpy() for name in names}


@pytest.fixture(scope="session")
def catalogue() -> Catalogue:
    """The tracks of the chunk."""
    return Catalogue.draw(SETTINGS.tracks, SETTINGS.seed)
