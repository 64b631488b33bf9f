"""Generated sessions: the official format, the real counts, and the rules behind the labels."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.skip.data import calibration
from maskmoe_kernels.experiments.skip.data.catalogue import Catalogue, random_ids
from maskmoe_kernels.experiments.skip.data.causes import CAUSE_GROUPS, CAUSES, NOISE, Causes
from maskmoe_kernels.experiments.skip.data.generator import (
    FADE,
    FEWEST_TRACKS,
    RUN,
    Settings,
    draw_chunk,
    generate,
)
from maskmoe_kernels.experiments.skip.data.mssd import prepare
from maskmoe_kernels.experiments.skip.data.mssd_columns import TRACK_FEATURES
from maskmoe_kernels.experiments.skip.data.sessions import SessionDataset, SessionLoader, Shards

SETTINGS = Settings(6_000, seed=1, tracks=20_000, chunk=6_000)


@pytest.fixture(scope="module")
def log() -> dict[str, np.ndarray]:
    """Columns of one chunk, dates and ids left out."""
    table, _ = draw_chunk(SETTINGS, 0)
    names = [name for name in table.column_names if name != "date"]
    return {name: table[name].to_numpy() for name in names}


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue.draw(SETTINGS.tracks, SETTINGS.seed)


@pytest.fixture(scope="module")
def data(log: dict[str, np.ndarray], catalogue: Catalogue) -> dict[str, np.ndarray]:
    """Per track of half B: what the rules of ``causes`` look at, and what was planted."""
    _, why = draw_chunk(SETTINGS, 0)
    place = {name: i for i, name in enumerate(catalogue.ids.to_pylist())}
    track = np.array([place[name] for name in log["track_id_clean"]])
    starts = (log["session_position"] == 1).nonzero()[0]
    length = log["session_length"][starts]
    half = length // 2
    second = log["session_position"] > log["session_length"] // 2
    of = np.repeat(np.arange(len(starts)), length)[second]
    skip = log["skip_2"]
    tail = np.stack([skip[starts + half - 1 - i] for i in range(RUN)], 1)
    style, first = catalogue.style[track], ~second
    session = np.repeat(np.arange(len(starts)), length)
    low, high = np.full(len(starts), np.inf), np.full(len(starts), -np.inf)
    np.minimum.at(low, session[first], style[first])
    np.maximum.at(high, session[first], style[first])
    sought = np.zeros(len(starts), bool)
    np.logical_or.at(sought, session[first], log["hist_user_behavior_n_seekfwd"][first] > 0)
    own = np.isin(log["context_type"], ["user_collection", "catalog"])
    found = {
        "run": (tail == tail[:, :1]).all(1)[of],
        "last": tail[of, 0],
        "offset": (log["session_position"][second] - 1 - half[of]),
        "free": ~log["premium"][starts][of],
        "shuffle": log["hist_user_behavior_is_shuffle"][starts][of],
        "own": own[starts][of],
        "sought": sought[of],
        "style": style[second],
        "all_energetic": (low > 1)[of],
        "all_acoustic": (high < -1)[of],
        "label": skip[second],
        "cause": np.array(CAUSES)[why["cause"].combine_chunks().indices.to_numpy()],
        "decisive": why["decisive"].to_numpy(),
    }
    return found | {name: catalogue.features[name][track[second]] for name in TRACK_FEATURES}


def rules(data: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Cause -> where its rule fires, and what it says, as the table in ``causes`` has it."""
    popularity, style = data["us_popularity_estimate"], data["style"]
    acoustic, energetic = style < -1, style > 1
    both = (data["mode"] == 1) ^ (data["release_year"] >= 2014)
    return {
        "persistence": (data["run"] & (data["offset"] < FADE), data["last"]),
        "context": (data["free"], ~data["own"]),
        "popularity": ((popularity < 91.5) | (popularity > 98.5), popularity < 91.5),
        "music": (
            (acoustic | energetic) & (data["all_energetic"] | data["all_acoustic"]),
            energetic ^ data["all_energetic"],
        ),
        "context+interaction": (
            ~data["free"] & data["shuffle"], data["sought"] ^ ~data["own"],
        ),
        "popularity+music": (data["instrumentalness"] > 0.5, both),
    }  # fmt: skip


def test_one_rule_fires_at_a_time_and_decides(data: dict[str, np.ndarray]) -> None:
    fired = rules(data)
    count = np.zeros(len(data["label"]), int)
    for name, (fires, says) in fired.items():
        count += fires
        assert np.array_equal(fires, data["cause"] == name), name
        assert np.array_equal(data["decisive"][fires], (data["label"] == says)[fires]), name
        turned = 1 - data["decisive"][fires].mean()
        assert abs(turned - NOISE) < 5 * (NOISE / fires.sum()) ** 0.5
        assert fires.mean() > 0.03
    assert count.max() == 1
    chance = data["cause"] == "chance"
    assert np.array_equal(count == 0, chance)
    assert not data["decisive"][chance].any()
    assert abs(data["label"][chance].mean() - calibration.SKIP) < 5 * 0.5 / chance.sum() ** 0.5
    assert 0.7 < data["decisive"].mean() < 0.85


# What each group of half A and B shows of a track, coarsely: enough to see any rule's parts.
SHOWN = {
    "interaction": ("run", "last", "sought"),
    "context": ("free", "shuffle", "own"),
    "popularity": ("low", "high", "new"),
    "music": ("is_energetic", "is_acoustic", "all_energetic", "all_acoustic", "played", "major"),
}


def test_only_the_groups_of_a_cause_tell_the_label(data: dict[str, np.ndarray]) -> None:
    """The best guess from one group alone is a coin, unless that group is the whole cause."""
    popularity = data["us_popularity_estimate"]
    shown = dict(data) | {
        "low": popularity < 91.5,
        "high": popularity > 98.5,
        "new": data["release_year"] >= 2014,
        "is_energetic": data["style"] > 1,
        "is_acoustic": data["style"] < -1,
        "played": data["instrumentalness"] > 0.5,
        "major": data["mode"] == 1,
    }
    early = data["offset"] < FADE
    for group, names in SHOWN.items():
        cell = sum(shown[name].astype(int) << i for i, name in enumerate(("early", *names)) if i)
        cell = cell + early
        total = np.bincount(cell, minlength=128)
        share = np.bincount(cell, data["label"], minlength=128) / np.maximum(total, 1)
        confidence = np.abs(2 * share[cell] - 1)
        for cause, groups in CAUSE_GROUPS.items():
            where = (data["cause"] == cause) & (total[cell] > 100)
            if groups == {group}:
                assert confidence[where].mean() > 0.9
            else:
                assert confidence[where].mean() < 0.15, (group, cause)


def test_baselines_are_near_the_papers(data: dict[str, np.ndarray]) -> None:
    """Repeating A's last skip: 63.0 in all and 74.2 on the first track, in the paper's table 2."""
    right = data["label"] == data["last"]
    assert 0.60 < right.mean() < 0.66
    assert 0.66 < right[data["offset"] == 0].mean() < 0.75


def test_log_follows_the_counts(log: dict[str, np.ndarray]) -> None:
    starts = (log["session_position"] == 1).nonzero()[0]
    count = len(starts)

    def assert_shares(values: np.ndarray, counts: dict, within: float) -> None:
        total = sum(counts.values())
        for name, expected in counts.items():
            assert abs((values == name).mean() - expected / total) < within, name

    lengths = dict(zip(range(10, 21), calibration.SESSION_LENGTHS, strict=True))
    assert_shares(log["session_length"][starts], lengths, 5 * 0.5 / count**0.5)
    assert_shares(log["context_type"][starts], calibration.CONTEXTS, 5 * 0.5 / count**0.5)
    assert abs(log["premium"][starts].mean() - calibration.PREMIUM) < 5 * 0.4 / count**0.5
    assert_shares(log["hist_user_behavior_reason_end"], calibration.END, 0.01)
    assert_shares(log["hist_user_behavior_reason_start"], calibration.START, 0.05)
    skip = log["skip_2"]
    assert abs(skip.mean() - calibration.SKIP) < 0.03
    after = log["session_position"][1:] > 1
    for before, expected in (
        (True, calibration.SKIP_AFTER_SKIP),
        (False, calibration.SKIP_AFTER_PLAY),
    ):
        assert abs(skip[1:][after & (skip[:-1] == before)].mean() - expected) < 0.05
    assert (log["skip_2"] >= log["skip_1"]).all()
    assert (log["skip_3"] >= log["skip_2"]).all()
    assert not (log["not_skipped"] & log["skip_3"]).any()


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


def test_files_depend_on_the_settings_alone(tmp_path: Path) -> None:
    settings = Settings(90, seed=2, tracks=2_000, chunk=40)
    generate(tmp_path / "one", settings)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == [
        "causes_0.parquet", "causes_1.parquet", "causes_2.parquet", "generation.json",
        "log_0.csv", "log_1.csv", "log_2.csv", "tf_0.csv",
    ]  # fmt: skip
    # Interrupted after two chunks, and taken up again.
    generate(tmp_path / "two", settings)
    (tmp_path / "two" / "log_1.csv").unlink()
    (tmp_path / "two" / ".unfinished-log_1.csv").write_text("left by a kill")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "two").glob("log_*")}
    generate(tmp_path / "two", settings)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    logs = [(tmp_path / "one" / f"log_{k}.csv").read_text() for k in range(3)]
    assert [text.count(",1,") > 0 for text in logs] == [True] * 3
    sessions = {line.split(",")[0] for text in logs for line in text.splitlines()[1:]}
    assert len(sessions) == 90
    other, _ = draw_chunk(Settings(90, seed=3, tracks=2_000, chunk=40), 0)
    assert not sessions & set(other["session_id"].to_pylist())


@pytest.fixture
def quick_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes forked from one that has imported torch already, instead of spawned ones."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["maskmoe_kernels.experiments.skip.data.generator"])
    monkeypatch.setattr(multiprocessing, "get_context", lambda method=None: context)


@pytest.mark.usefixtures("quick_processes")
def test_processes_write_the_same(tmp_path: Path) -> None:
    settings = Settings(60, tracks=2_000, chunk=30)
    generate(tmp_path / "one", settings)
    generate(tmp_path / "two", settings, workers=2, progress=True)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_folder_of_other_sessions_is_refused(tmp_path: Path) -> None:
    settings = Settings(20, tracks=2_000)
    generate(tmp_path, settings)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        DataError, match=r"generation\.json: expected .*'seed': 1.* got .*'seed': 0"
    ):
        generate(tmp_path, Settings(20, seed=1, tracks=2_000))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "generation.json").unlink()
    with pytest.raises(DataError, match=r"unknown origin, got \['causes_0\.parquet', 'log_0\.csv'"):
        generate(tmp_path, settings)
    for bad, message in (
        ({"sessions": 0}, "at least 1 and seed at least 0, got 0"),
        ({"sessions": 1, "tracks": 9}, "tracks must be at least 2000, got 9"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings(**bad)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        generate(tmp_path / "new", settings, workers=0)


def test_causes_meet_their_batches(tmp_path: Path) -> None:
    generate(tmp_path / "csv", Settings(400, seed=4, tracks=2_000, chunk=150))
    prepare([tmp_path / "csv"], tmp_path / "shards", strict=True)
    tables = [pq.read_table(p).to_pylist() for p in sorted((tmp_path / "csv").glob("causes_*"))]
    rows = {(row["session_id"], row["session_position"]): row for t in tables for row in t}
    causes = Causes(tmp_path / "csv")
    assert len(causes) == 400
    met = 0
    for batch in SessionLoader(SessionDataset(Shards(tmp_path / "shards", "train"), 64, seed=1)):
        cause, decisive = causes.of(batch.session_ids)
        assert (cause.dtype, decisive.dtype) == (torch.int64, torch.bool)
        real = ~batch.second_padding
        assert not cause[~real].any()
        assert not decisive[~real].any()
        position: Tensor = ((batch.second[..., 0] + 1) * 10).round().long()
        for b, t in real.nonzero().tolist():
            row = rows[batch.session_ids[b], int(position[b, t])]
            assert (CAUSES[cause[b, t]], bool(decisive[b, t])) == (row["cause"], row["decisive"])
            met += 1
    assert met > 1_000
    with pytest.raises(DataError, match=r"session 'x': expected one of the 400 generated"):
        causes.of([batch.session_ids[0], "x"])
    with pytest.raises(DataError, match=r"expected causes_\*\.parquet, got none"):
        Causes(tmp_path)
    (tmp_path / "csv" / "causes_1.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"causes_1\.parquet: expected a whole file of causes"):
        Causes(tmp_path / "csv")


def test_settings_are_written_down(tmp_path: Path) -> None:
    generate(tmp_path, Settings(10, seed=9, tracks=2_000, chunk=10))
    found = json.loads((tmp_path / "generation.json").read_text())
    assert found == {"sessions": 10, "seed": 9, "tracks": 2_000, "chunk": 10}
