"""Prepared sessions, and trained models."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskmoe_kernels.experiments.skip.pace import Pace
from maskmoe_kernels.experiments.skip.settings import MODELS, Settings
from maskmoe_kernels.experiments.skip.train import train
from tests.experiments.skip.skip_sessions import write_sessions


@pytest.fixture(scope="session")
def generated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """300 generated sessions: the folder of csv files, and that of the shards."""
    return write_sessions(tmp_path_factory.mktemp("sessions"))


@pytest.fixture(scope="session")
def data(generated: tuple[Path, Path]) -> Path:
    """The shards of 300 sessions."""
    return generated[1]


@pytest.fixture(scope="session")
def made(generated: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Generated sessions, their shards, and a run of an interpretable and of a black-box model."""
    csv, data = generated
    once = Pace(epochs=1, learning_rate=1e-3)
    folder = tmp_path_factory.mktemp("made")
    for name in (MODELS[1], MODELS[3]):
        train(data, folder / name, Settings(name, width=4, layers=1, batch_size=64), once)
    return {"csv": csv, "data": data, "experts": folder / MODELS[1], "black": folder / MODELS[3]}
