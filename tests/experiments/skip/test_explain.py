"""A session in words."""

from __future__ import annotations

import io
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.skip.data.shards import Shards
from maskmoe_kernels.experiments.skip.evaluate import evaluate
from maskmoe_kernels.experiments.skip.explain import explain, header_in_words, reason_in_words
from maskmoe_kernels.experiments.skip.generator.causes import CAUSES
from maskmoe_kernels.experiments.skip.models import logits_of
from maskmoe_kernels.experiments.skip.pace import Pace
from maskmoe_kernels.experiments.skip.runs import load
from maskmoe_kernels.experiments.skip.settings import MODELS, TOLERANCE, Settings, weighting_of
from maskmoe_kernels.experiments.skip.train import train
from maskmoe_kernels.explain import sufficient
from maskmoe_kernels.layout.families import skip_sessions
from maskmoe_kernels.models.sessions import SessionExperts
from maskmoe_kernels.ops.selection import mixture

FAMILY = skip_sessions()[0]


def test_explanation_says_what_the_model_computes(made: dict[str, Path], tmp_path: Path) -> None:
    text = Console(file=io.StringIO(), width=200)
    said = explain(made["data"], made["experts"], causes=made["csv"], out=tmp_path, console=text)
    batch, rows = Shards(made["data"], "test").find(said.session)
    model, settings, _ = load(made["experts"])
    assert isinstance(model, SessionExperts)
    mixed = mixture(logits_of(model, batch, settings).detach().double(), model.family)
    labels = [row["skip_2"] for row in rows.to_pylist()][len(rows) // 2 :]
    assert [track.skipped for track in said.tracks] == labels
    for t, track in enumerate(said.tracks):
        assert track.probability == pytest.approx(float(mixed.probability[0, t]), abs=1e-6)
        expert = int(mixed.attribution[0, t].argmax())
        assert track.expert == model.family.names[expert]
        assert track.share == pytest.approx(float(mixed.attribution[0, t, expert]), abs=1e-6)
        assert track.position == len(rows) // 2 + 1 + t
        assert track.cause in CAUSES
    lines = text.file.getvalue()  # type: ignore[attr-defined]
    first = said.tracks[0]
    sure = max(first.probability, 1 - first.probability)
    verb = ("played", "skipped")
    assert (
        f"Track {first.position} was {verb[first.skipped]}; predicted: {verb[first.predicted]}, "
        f"{100 * sure:.0f} % sure. {first.expert} decides with {first.share:.0%}"
    ) in lines
    right = sum(track.skipped == track.predicted for track in said.tracks)
    assert f"Right on {right} of {len(labels)} tracks" in lines
    assert len(list(tmp_path.glob("explain-*.json"))) == 1
    assert len(list(tmp_path.glob("explain-*.png"))) == 1


def test_experts_that_are_not_mixed_explain_by_who_suffices(
    made: dict[str, Path], tmp_path: Path
) -> None:
    """Whatever it learned: the one that sees all predicts, and a smaller one says the same."""
    once = Pace(epochs=1, learning_rate=1e-3)
    settings = Settings(MODELS[1], width=3, layers=1, batch_size=64, weighting="uniform")
    assert weighting_of("sufficient", None) == settings.weighting
    run = tmp_path / "run"
    train(made["data"], run, settings, once)
    text = Console(file=io.StringIO(), width=300)
    said = explain(made["data"], run, causes=made["csv"], out=tmp_path / "out", console=text)
    assert (said.sharpness, said.tolerance) == (None, TOLERANCE)
    model, settings, _ = load(run)
    assert isinstance(model, SessionExperts)
    batch, _ = Shards(made["data"], "test").find(said.session)
    logits = logits_of(model, batch, settings).detach().double()[0]
    found = sufficient(logits, model.family, TOLERANCE)
    for t, track in enumerate(said.tracks):
        assert track.probability == pytest.approx(float(logits[t, -1].mul(2).sigmoid()), abs=1e-6)
        assert track.expert == model.family.names[int(found.expert[t])]
        assert track.share == track.attribution[track.expert] == 1
    lines = text.file.getvalue()  # type: ignore[attr-defined]
    assert " suffices: the answer would be the same knowing only " in lines
    assert "Smallest expert that suffices: " in lines
    report = evaluate(made["data"], tmp_path / "out", [run], causes=made["csv"])
    row = report["models"][MODELS[1]]
    assert row["tolerance"] == TOLERANCE
    assert "sharpness" not in row
    assert sum(row["decided"].values()) == pytest.approx(1)
    assert row["mean_attribution"] == pytest.approx(row["decided"])
    with pytest.raises(DataError, match="--sharpness mixes experts, and this model's are not"):
        explain(made["data"], run, sharpness=2.0)
    with pytest.raises(DataError, match=r"--weighting selection has no place beside it"):
        weighting_of("sufficient", "selection")


def test_explain_refuses_what_it_cannot_explain(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no experts to explain"):
        explain(made["data"], made["black"], out=tmp_path)
    with pytest.raises(DataError, match="'nobody' is not among the"):
        explain(made["data"], made["experts"], "nobody", out=tmp_path)
    assert not list(tmp_path.iterdir())


def row(position: int, skipped: bool, **others: Any) -> dict[str, Any]:
    return {
        "session_id": "s", "session_position": position, "skip_2": skipped, "premium": False,
        "context_type": 1, "hist_user_behavior_is_shuffle": False, "hour_of_day": 7,
        "hist_user_behavior_n_seekfwd": 0, "date": date(2018, 7, 15), "duration": 195.0,
        "release_year": 1999.0, "us_popularity_estimate": 98.71, "energy": 0.9, "mode": 1.0,
        "acousticness": 0.125, "instrumentalness": 0.0, "danceability": 0.5,
    } | others  # fmt: skip


def test_words_tell_what_is_in_the_rows() -> None:
    first = [row(1, True), row(2, False), row(3, True), row(4, True)]
    first[1]["hist_user_behavior_n_seekfwd"] = 2
    rows = [*first, *(row(k, False) for k in range(5, 9))]
    assert header_in_words(rows) == (
        "Session s: 8 tracks, Sunday at 7 h, free account, radio. Of the first 4 tracks 3 were "
        "skipped; the last 2 were skipped, 2 seeks forward."
    )
    told = {name: reason_in_words((name,), first, rows[5]) for name in FAMILY.groups}
    assert told["position"] == "the place in the session"
    assert told["popularity"] == "popularity 98.7, of 1999, 3:15 min"
    assert told["music"] == (
        "energy 0.90, acousticness 0.12, instrumentalness 0.00, danceability 0.50, major"
    )
    both = reason_in_words(("position", "context", "interaction"), first, rows[5])
    assert both == "free account, radio; the last 2 were skipped, 2 seeks forward"
    assert "the last was played" in reason_in_words(("interaction",), first[:2], rows[5])
    premium = [row(1, True, premium=True, context_type=2, hist_user_behavior_is_shuffle=True)]
    assert reason_in_words(("context",), premium, rows[5]) == (
        "paying account, own collection, shuffled"
    )
