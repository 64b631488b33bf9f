"""The commands: their defaults, and a run on the real sessions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from maskmoe_kernels.cli import main
from maskmoe_kernels.experiments.skip import train as training
from maskmoe_kernels.experiments.skip.pace import Pace
from maskmoe_kernels.experiments.skip.settings import MODELS, Settings
from maskmoe_kernels.experiments.skip.train import Means


def test_the_command_has_the_same_defaults(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[object] = []

    def caught(*words: object) -> None:
        got.extend(words)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", caught)
    assert main(["skip", "train", "--data", "d", "--out", "o"]) == 130
    assert got[:5] == [Path("d"), Path("o"), Settings(MODELS[0]), Pace(), Means()]
    got.clear()
    words = (
        "skip train --data d --out o --model black-box-gru --width 5 --heads 2 --batch 9 --seed 3 "
        "--precision bfloat16 --confidence square --sharpness 2 --weighting selection --normalize "
        "none --epochs 7 --steps 11 --patience 3 --lr 0.01 --least-lr 0.1 --plateau 0 --clip 2 "
        "--save-every 13 --workers 2 --overwrite --compile"
    )
    assert main(words.split()) == 130
    assert got[2] == Settings(
        "black-box-gru", 5, 2, 1, 9, 3, "bfloat16", "square", 2.0, "selection", "none"
    )
    assert got[3] == Pace(7, 11, 3, 0.01, 0.01, 0.3, 0, 2.0, 13)
    assert got[4] == Means(2, False, True)


def test_real_sessions_from_csv_to_words(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> str:
        assert main(["skip", *words]) == 0
        return capsys.readouterr().out

    data, model = str(tmp_path / "data"), str(tmp_path / "model")
    prepared = run("prepare", str(shared_data / "mssd-sample"), "--out", data)
    assert "sessions: 9 train, 1 valid, 1 test; left out: 0" in prepared
    small = ["--batch", "4", "--width", "4", "--layers", "1", "--epochs", "2", "--out", model]
    assert "best epoch" in run("train", "--data", data, *small)
    table = run("evaluate", "--data", data, "--runs", model, "--out", str(tmp_path / "all"))
    assert "interpretable-transformer" in table
    judged = json.loads((tmp_path / "all" / "evaluation.json").read_text())
    assert judged["sessions"] == 1
    said = run("explain", "--data", data, "--run", model, "--out", str(tmp_path / "all"))
    assert said.count(" was ") >= 5
