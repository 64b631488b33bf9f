"""Generated sessions of known users: every cause is in the features that `prepare` computes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from maskmoe_kernels.cli import main
from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.skip.data.prepare import prepare
from maskmoe_kernels.experiments.skip.data.sessions import SessionDataset
from maskmoe_kernels.experiments.skip.data.shards import Shards
from maskmoe_kernels.experiments.skip.generator.causes import NOISE, Causes
from maskmoe_kernels.experiments.skip.generator.generate import generate, remove
from maskmoe_kernels.experiments.skip.generator.settings import GeneratorSettings
from maskmoe_kernels.experiments.skip.generator.users import USERS
from maskmoe_kernels.experiments.skip.runs import check_schema, load
from maskmoe_kernels.experiments.skip.schema.parse import shipped
from tests.experiments.skip.skip_sessions import command

SETTINGS = GeneratorSettings(800, seed=2, tracks=3_000, chunk=400, kind="users")
NAMES = tuple(USERS.causes)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("users")
    generate(folder, SETTINGS)
    return folder


@pytest.fixture(scope="module")
def data(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("duckdb")
    folder = tmp_path_factory.mktemp("shards")
    prepare([raw], folder, USERS)
    return folder


def test_a_chunk_depends_on_nothing_but_settings_and_number(raw: Path, tmp_path: Path) -> None:
    assert sorted(p.name for p in raw.glob("events_*")) == ["events_0.parquet", "events_1.parquet"]
    generate(tmp_path, SETTINGS)
    (tmp_path / "events_1.parquet").unlink()
    generate(tmp_path, SETTINGS)
    for path in raw.glob("*_*"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
    with pytest.raises(DataError, match=r"expected .*seed.: 3"):
        generate(tmp_path, GeneratorSettings(800, 3, 3_000, 400, "users"))
    remove(tmp_path)
    assert not list(tmp_path.iterdir())


def test_sessions_are_as_the_schema_wants_them(raw: Path, data: Path) -> None:
    sizes = [len(Shards(data, split)) for split in ("train", "valid", "test")]
    assert sum(sizes) == 800
    lengths = []
    for path in (data / "train").glob("*.parquet"):
        rows = pq.read_table(path).to_pylist()
        lengths += [row["session_length"] for row in rows if row["session_position"] == 1]
    assert (min(lengths), max(lengths)) == (20, 50)
    causes = pq.read_table(sorted(raw.glob("causes_*.parquet"))[0])
    share = np.mean([d for d, c in zip(causes["decisive"].to_pylist(), causes["cause"].to_pylist(),
                                       strict=True) if c != "chance"])  # fmt: skip
    assert share == pytest.approx(1 - NOISE, rel=0, abs=0.01)


def test_each_label_follows_from_the_groups_of_its_cause(raw: Path, data: Path) -> None:
    shards, causes = Shards(data, "train"), Causes(raw, USERS)
    at = {name: i for i, name in enumerate(USERS.second_columns)}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in NAMES}
    for batch in SessionDataset(shards, 128, seed=0):
        cause, decisive = causes.of_batch(batch)
        assert not decisive[batch.second_padding].any()
        # What half A tells: the mean label, and the valence of its tracks.
        given = batch.first[..., USERS.label_column]
        mood = given.mean(1)
        valence = batch.first[..., USERS.first_columns.index("valence")].mean(1)
        told = torch.stack([mood, valence], 1)[:, None].expand(-1, cause.shape[1], -1)
        rows = torch.cat([batch.second, told, batch.target[..., None]], -1)
        for code, name in enumerate(NAMES):
            found[name].append(rows[(cause == code) & decisive & ~batch.second_padding])
    rows = {name: torch.cat(parts).double() for name, parts in found.items() if name != "chance"}
    assert all(len(part) > 100 for part in rows.values())
    # The normalised year and age have two peaks, with nothing between 2007 and 2015.
    rules = {
        "persistence": lambda x: x[:, -3] > 0.5,
        "favourite": lambda x: x[:, at["banned"]] > 0.5,
        "discounted": lambda x: x[:, at["pair_skip_rate"]] > 0,
        "listener": lambda x: x[:, at["plays_in_a_day"]] > 0,
        "music": lambda x: (x[:, at["energy"]] > 0) != (x[:, -2] > 0),
        "popularity+music": lambda x: (x[:, at["release_year"]] > 0.3) ^ (x[:, at["mode"]] > 0),
        "popularity+listener": lambda x: (x[:, at["release_year"]] > 0.3) ^ (x[:, at["age"]] < 0),
        "listener+music": lambda x: (x[:, at["mode"]] > 0) ^ (x[:, at["age"]] < 0),
        "discounted+music": lambda x: (x[:, at["pair_skip_rate"]] > 0) ^ (x[:, at["mode"]] > 0),
    }
    for name, rule in rules.items():
        x = rows[name]
        right = (rule(x) == (x[:, -1] > 0.5)).double().mean()
        assert right > (0.97 if name in ("persistence", "music") else 0.999), name
    hits = rows["popularity"]
    plays, skipped = hits[:, at["plays"]], hits[:, -1] > 0.5
    assert plays[skipped].mean() < plays[~skipped].mean() - 0.1
    for name in ("popularity+music", "popularity+listener", "listener+music"):
        x = rows[name]  # one group alone carries no information
        for column in ("release_year", "mode", "age"):
            sided = x[x[:, at[column]] > 0][:, -1].mean()
            assert abs(float(sided) - 0.5) < 0.2, (name, column)


def test_causes_of_a_slice_are_those_of_its_tracks(raw: Path, data: Path) -> None:
    causes = Causes(raw, USERS)
    by_session: dict[str, list[tuple[str, bool]]] = {}
    for path in sorted(raw.glob("causes_*.parquet")):
        for row in pq.read_table(path).to_pylist():
            own = by_session.setdefault(row["session_id"], [])
            assert row["session_position"] == len(own) + 1
            own.append((row["cause"], row["decisive"]))
    batch = next(iter(SessionDataset(Shards(data, "valid"), 32, seed=1)))
    assert batch.offset is not None
    assert len(set(batch.offset.tolist())) > 3
    cause, decisive = causes.of_batch(batch)
    for b, name in enumerate(batch.session_ids):
        begin = int(batch.offset[b]) + 10
        told = [(NAMES[c], d) for c, d in zip(cause[b].tolist(), decisive[b].tolist(), strict=True)]
        assert told == by_session[name][begin : begin + 10]


def test_from_generated_events_to_words(
    raw: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> str:
        assert main(["skip", *words]) == 0
        return capsys.readouterr().out

    model, out = str(tmp_path / "model"), str(tmp_path / "out")
    small = ["--model", "interpretable-gru", "--width", "4", "--epochs", "1", "--lr", "0.01"]
    run("train", "--data", str(data), *small, "--out", model)
    said = run("evaluate", "--data", str(data), "--runs", model, "--causes", str(raw), "--out", out)
    assert "# paper: table 3, other sessions" in said
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["models"]["last"]["paper"]["Acc"] == 69.0
    assert list(report["models"]) == ["random", "last", "mean", "interpretable-gru"]
    assert report["models"]["random"]["Acc"] == pytest.approx(0.5, rel=0, abs=0.06)
    assert report["models"]["random"]["MAA"] == pytest.approx(0.323, rel=0, abs=0.06)
    own = report["models"]["interpretable-gru"]["decisive"]
    assert sum(row["tracks"] for row in own["causes"].values()) == own["tracks"] > 200
    said = run("explain", "--data", str(data), "--run", model, "--causes", str(raw), "--out", out)
    assert "Summed: persistence" in said
    assert said.count("The label's cause: ") == 10
    names = {path.name.split("-")[0] for path in (tmp_path / "out").glob("*.png")}
    assert names == {"subsets.png", "attribution", "causes", "learning_curves.png", "explain"}
    with pytest.raises(DataError, match="expected a run with the groups and experts"):
        check_schema(tmp_path / "model", load(tmp_path / "model")[0], shipped("mssd"))


@pytest.mark.deep
def test_a_killed_training_on_slices_ends_with_the_same_weights(data: Path, tmp_path: Path) -> None:
    words = ["skip", "train", "--data", str(data), "--model", "interpretable-gru", "--width", "3",
             "--batch", "64", "--epochs", "2", "--lr", "0.01", "--save-every", "2", "--threads",
             "1", "--embeddings", "strict", "--out"]  # fmt: skip
    assert command([*words, str(tmp_path / "whole")]) == 0
    for kill in ("step:3", "save:2", "step:13"):
        assert command([*words, str(tmp_path / "killed"), "--resume"], kill) == -9
    assert command([*words, str(tmp_path / "killed"), "--resume"]) == 0
    whole, killed = (load(tmp_path / name)[2].state for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
