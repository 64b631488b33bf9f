"""Judging skip models: who sees a cause, tables, figures, and a session in words."""

from __future__ import annotations

import io
import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from maskmoe_kernels.cli import main
from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.skip.data.causes import CAUSES, Causes
from maskmoe_kernels.experiments.skip.data.session_features import SKIP_2
from maskmoe_kernels.experiments.skip.data.sessions import SessionDataset, Shards
from maskmoe_kernels.experiments.skip.evaluation import Deciders, evaluate, sees_cause
from maskmoe_kernels.experiments.skip.explain import explain, header_in_words, reason_in_words
from maskmoe_kernels.experiments.skip.train import MODELS, Settings, load, logits_of, train
from maskmoe_kernels.experiments.skip.trainer import Pace
from maskmoe_kernels.layout.families import skip_sessions
from maskmoe_kernels.models.sessions import SessionExperts
from maskmoe_kernels.ops.selection import mixture
from tests.experiments.skip.skip_sessions import write_sessions

FAMILY = skip_sessions()[0]
ONCE = Pace(epochs=1, learning_rate=1e-3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Generated sessions, their shards, and a run of an interpretable and of a black-box model."""
    folder = tmp_path_factory.mktemp("made")
    csv, data = write_sessions(folder)
    for name in (MODELS[1], MODELS[3]):
        train(data, folder / name, Settings(name, width=4, layers=1, batch_size=64), ONCE)
    return {"csv": csv, "data": data, "experts": folder / MODELS[1], "black": folder / MODELS[3]}


# --- Who decides -------------------------------------------------------------------------


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


# --- Evaluate ----------------------------------------------------------------------------


def test_evaluation_counts_what_the_models_say(made: dict[str, Path], tmp_path: Path) -> None:
    runs = [made["experts"], made["black"]]
    report = evaluate(made["data"], tmp_path, runs, causes=made["csv"])
    assert json.loads((tmp_path / "evaluation.json").read_text()) == report
    batches = list(SessionDataset(Shards(made["data"], "test"), 7))
    rights: dict[str, list[bool]] = {"last": [], MODELS[1]: [], MODELS[3]: []}
    seen = []
    model, settings, _ = load(made["experts"])
    black, black_settings, _ = load(made["black"])
    assert isinstance(model, SessionExperts)
    causes = Causes(made["csv"])
    for batch in batches:
        mixed = mixture(logits_of(model, batch, settings).detach(), model.family)
        chances = {
            MODELS[1]: mixed.probability,
            MODELS[3]: logits_of(black, batch, black_settings).sigmoid(),
        }
        why, decisive = causes.of(batch.session_ids)
        for b in range(len(batch)):
            length = int((~batch.first_padding[b]).sum())
            last = bool(batch.first[b, length - 1, SKIP_2])
            for t in range(int((~batch.second_padding[b]).sum())):
                label = bool(batch.target[b, t])
                rights["last"].append(last == label)
                for name, chance in chances.items():
                    rights[name].append(bool(chance[b, t] > 0.5) == label)
                if decisive[b, t]:
                    expert = int(mixed.attribution[b, t].argmax())
                    seen.append(bool(sees_cause(model.family)[0][why[b, t], expert]))
    for name, right in rights.items():
        assert report["models"][name]["Acc"] == pytest.approx(sum(right) / len(right))
    found = report["models"][MODELS[1]]["decisive"]
    assert found["tracks"] == len(seen)
    assert found["sees"] == pytest.approx(sum(seen) / len(seen))
    assert report["models"]["last"]["paper"]["Acc"] == 63.0
    figures = {path.name for path in tmp_path.glob("*.png")}
    marks = {f"{kind}-{MODELS[1]}.png" for kind in ("attribution", "causes")}
    assert figures == {"subsets.png", "learning_curves.png", *marks}


def test_two_runs_of_one_model_are_named_by_their_folders(
    made: dict[str, Path], tmp_path: Path
) -> None:
    again = tmp_path / "again"
    again.mkdir()
    (again / "checkpoint.pt").write_bytes((made["experts"] / "checkpoint.pt").read_bytes())
    report = evaluate(made["data"], tmp_path, [made["experts"], again])
    ours, theirs = (report["models"][str(p)] for p in (made["experts"], again))
    assert ours["Acc"] == theirs["Acc"]
    assert "decisive" not in ours
    with pytest.raises(DataError, match="named twice"):
        evaluate(made["data"], tmp_path, [again, again])


def test_causes_of_other_sessions_are_an_error(made: dict[str, Path], tmp_path: Path) -> None:
    others = write_sessions(tmp_path / "others", 3)[0]
    (others / "causes_0.parquet").rename(tmp_path / "causes_0.parquet")
    with pytest.raises(DataError, match="expected one of the 3 generated sessions"):
        evaluate(made["data"], tmp_path, [made["experts"]], causes=tmp_path)
    assert not (tmp_path / "evaluation.json").exists()


# --- Explain -----------------------------------------------------------------------------


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


# --- The real sessions -------------------------------------------------------------------


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
