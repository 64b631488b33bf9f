"""Evaluation: counts, names of runs, and causes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.skip.data.features import SKIP_2
from maskmoe_kernels.experiments.skip.data.sessions import SessionDataset
from maskmoe_kernels.experiments.skip.data.shards import Shards
from maskmoe_kernels.experiments.skip.deciders import sees_cause
from maskmoe_kernels.experiments.skip.evaluate import evaluate
from maskmoe_kernels.experiments.skip.generator.causes import Causes
from maskmoe_kernels.experiments.skip.models import logits_of
from maskmoe_kernels.experiments.skip.runs import load
from maskmoe_kernels.experiments.skip.settings import MODELS
from maskmoe_kernels.models.sessions import SessionExperts
from maskmoe_kernels.ops.selection import mixture
from tests.experiments.skip.skip_sessions import write_sessions


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
