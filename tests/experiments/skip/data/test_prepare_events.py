"""Logs of events: sessions, features of the past without a leak, every format, steps kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.skip.data import chunk, database, prepare_events
from maskmoe_kernels.experiments.skip.data.prepare import prepare
from maskmoe_kernels.experiments.skip.data.sessions import SessionDataset, SessionLoader
from maskmoe_kernels.experiments.skip.data.shard_format import SPLITS
from maskmoe_kernels.experiments.skip.data.shards import Shards
from maskmoe_kernels.experiments.skip.schema.parse import parse_schema
from tests.experiments.skip.data.files import contents, manifest
from tests.experiments.skip.logs import MINUTE, START, TEXT, draw_events, write_log, write_table

pytest.importorskip("duckdb")
SCHEMA = parse_schema(TEXT)
SLICED = parse_schema(TEXT.replace("shortest = 2", "shortest = 2\nslice = 6"))
ROOT = Path(__file__).resolve().parents[4]


def rows_of(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Session id -> its rows."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for split in SPLITS:
        for path in sorted((out / split).glob("*.parquet")):
            for row in pq.read_table(path).to_pylist():
                rows.setdefault(row["session_id"], []).append(row)
    return rows


def ids_of(out: Path, folder: str) -> list[str]:
    return pq.read_table(out / folder / "tracks.parquet").column(0).to_pylist()


def shards_of(out: Path) -> dict[str, bytes]:
    """The files that readers read, but for the manifest."""
    kept = {k: v for k, v in contents(out).items() if k.split("/")[0] not in ("checked", "sorted")}
    return kept | {"digest": manifest(out)["digest"].encode()}


@pytest.fixture(scope="module")
def events() -> dict[str, Any]:
    return draw_events()


@pytest.fixture(scope="module")
def made(events: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared log of three files, in chunks of few events."""
    folder = tmp_path_factory.mktemp("log")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_events, "CHUNK_EVENTS", 100)
        write_log(folder / "log", events, files=3)
        prepare([folder / "log"], folder / "out", SCHEMA, row_group=4)
    return folder / "out"


def sessions_by_hand(events: dict[str, Any]) -> dict[str, list[int]]:
    """Session id -> rows of the events, in order of time."""
    found: dict[str, list[int]] = {}
    for user in sorted(set(events["who"])):
        rows = [i for i, who in enumerate(events["who"]) if who == user]
        rows.sort(key=lambda i: events["when"][i])
        name, last = "", None
        for i in rows:
            when = int(events["when"][i])
            if last is None or when - last > 30 * MINUTE:
                instant = np.datetime64(when, "ms")
                name = f"{user}/{instant}"
            found.setdefault(name, []).append(i)
            last = when
    return {name: rows for name, rows in found.items() if 2 <= len(rows) <= 40}


def past_by_hand(events: dict[str, Any], start: int, who: str, what: str) -> dict[str, float]:
    """The features of the past, from a loop over all events before ``start``."""
    before = [i for i in range(len(events["who"])) if events["when"][i] < start]
    user = [i for i in before if events["who"][i] == who]
    item = [i for i in before if events["what"][i] == what]
    pair = [i for i in user if events["what"][i] == what]

    def rate(rows: list[int], half_life: float = float("inf")) -> float:
        weights = [2.0 ** (-(start - int(events["when"][i])) / half_life) for i in rows]
        left = sum(w for w, i in zip(weights, rows, strict=True) if events["left"][i])
        return (left + 0.5) / (sum(weights) + 1)

    recent = [i for i in item if events["when"][i] >= start - 90 * MINUTE]
    wanted = {("u0", "i1"): START + 100 * MINUTE, ("u1", "i2"): START - 1}
    return {
        "user_rate": rate(user),
        "item_rate": rate(item),
        "pair_rate": rate(pair, 120 * MINUTE),
        "decayed": rate(user, 24 * 60 * MINUTE),
        "sold": float(np.log1p(len(recent))),
        "seen": float(np.log1p(len(pair))),
        "wanted": float(wanted.get((who, what), 10**15) < start),
    }


def test_sessions_and_their_past_are_those_of_a_loop(made: Path, events: dict[str, Any]) -> None:
    expected, found = sessions_by_hand(events), rows_of(made)
    assert found.keys() == expected.keys()
    assert len(found) > 40
    users, items = ids_of(made, "users"), ids_of(made, "tracks")
    values = []
    for name, rows in found.items():
        start = min(int(events["when"][i]) for i in expected[name])
        assert [r["session_position"] for r in rows] == list(range(1, len(rows) + 1))
        told = [(users[r["user"]], items[r["track"]], r["when"], r["left"]) for r in rows]
        columns = ("who", "what", "when", "left")
        assert sorted(told) == sorted(tuple(events[c][i] for c in columns) for i in expected[name])
        assert [t[2] for t in told] == sorted(t[2] for t in told)
        for row, (who, what, *_) in zip(rows, told, strict=True):
            want = past_by_hand(events, start, who, what)
            assert {k: row[k] for k in want} == pytest.approx(want, rel=1e-6, abs=1e-6)
            values.append(want)
    for name in values[0]:  # each is told apart from a constant
        assert len({round(value[name], 6) for value in values}) > 1, name


def test_labels_of_a_session_and_after_it_are_nowhere_in_its_past(
    made: Path, events: dict[str, Any], tmp_path: Path
) -> None:
    name = sorted(sessions_by_hand(events))[len(sessions_by_hand(events)) // 2]
    start = min(int(events["when"][i]) for i in sessions_by_hand(events)[name])
    late = [int(when) >= start for when in events["when"]]
    flipped = [bool(left) ^ is_late for left, is_late in zip(events["left"], late, strict=True)]
    changed = {**events, "left": flipped}
    prepare([write_log(tmp_path / "log", changed)], tmp_path / "out", SCHEMA)
    before, after = rows_of(made), rows_of(tmp_path / "out")
    past = list(SCHEMA.past)
    same = moved = 0
    for session, rows in before.items():
        same_past = [[r[p] for p in past] for r in rows] == [
            [r[p] for p in past] for r in after[session]
        ]
        if min(r["when"] for r in rows) <= start:
            assert same_past, session
            same += 1
        else:
            moved += not same_past
    assert same > 5
    assert moved > 5


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_every_format_gives_the_same_shards(
    made: Path, events: dict[str, Any], tmp_path: Path, ending: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(prepare_events, "CHUNK_EVENTS", 100)
    log = write_log(tmp_path / "log", {**events, "when": pa.array(events["when"]).cast(
        pa.timestamp("ms"))}, ending, files=3)  # fmt: skip
    (log / "more" / "visits").mkdir(parents=True)  # a folder with the pattern's name
    (log / f"visits_2.{ending}").rename(log / "more" / "visits" / f"west_2.{ending}")
    prepare([log], tmp_path / "out", SCHEMA, row_group=4)
    ours, theirs = contents(tmp_path / "out"), contents(made)
    for name in theirs:
        if name.split("/")[0] in SPLITS:
            assert ours[name] == theirs[name], name


def test_sessions_by_id_and_by_user(events: dict[str, Any], tmp_path: Path) -> None:
    text = TEXT.replace('by = "inactivity"', 'by = "id"\ncolumn = "visit"\nsplit = "user"')
    text = text.replace('gap = "30 minutes"\n', "")
    text = text.replace(
        'left = { kind = "flag" }', 'left = { kind = "flag" }\nvisit = { kind = "id" }'
    )
    visit = [f"v{int(when) // (200 * MINUTE) % 3}" for when in events["when"]]
    log = write_log(tmp_path / "log", {**events, "visit": visit})
    prepare([log], tmp_path / "out", parse_schema(text))
    found = rows_of(tmp_path / "out")
    users = ids_of(tmp_path / "out", "users")
    counted: dict[str, int] = {}
    for who, one in zip(events["who"], visit, strict=True):
        counted[f"{who}/{one}"] = counted.get(f"{who}/{one}", 0) + 1
    wanted = {name: count for name, count in counted.items() if 2 <= count <= 40}
    assert {name: len(rows) for name, rows in found.items()} == wanted
    owners = {
        split: {
            users[row["user"]]
            for path in (tmp_path / "out" / split).glob("*.parquet")
            for row in pq.read_table(path).to_pylist()
        }
        for split in SPLITS
    }
    assert not owners["train"] & (owners["valid"] | owners["test"])


def test_a_run_stopped_anywhere_ends_with_the_same_bits(
    made: Path, events: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(prepare_events, "CHUNK_EVENTS", 100)
    log, out = write_log(tmp_path / "log", events, files=3), tmp_path / "out"
    stops = 0
    from maskmoe_kernels import files

    move = files._Unfinished.move_to

    def stop_before(number: int) -> Callable[..., None]:
        count = iter(range(10**6))

        def moved(self: Any, path: Path) -> None:
            if next(count) == number:
                raise KeyboardInterrupt
            move(self, path)

        return moved

    for number in range(3):  # each run gets a few files further than the one before
        monkeypatch.setattr(files._Unfinished, "move_to", stop_before(5 + number))
        try:
            prepare([log], out, SCHEMA, row_group=4)
        except KeyboardInterrupt:
            stops += 1
        assert not (out / "manifest.json").exists()
    monkeypatch.setattr(files._Unfinished, "move_to", move)
    assert stops == 3
    prepare([log], out, SCHEMA, row_group=4)
    assert shards_of(out) == shards_of(made)
    assert not list(out.rglob(".unfinished*"))
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")}
    prepare([log], out, SCHEMA, row_group=4)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")} == times


_KILLED = """
import itertools, os, signal, sys
from maskmoe_kernels import files
from maskmoe_kernels.experiments.skip.data import prepare_events
from maskmoe_kernels.experiments.skip.data.prepare import prepare
from maskmoe_kernels.experiments.skip.schema.parse import parse_schema
from tests.experiments.skip.logs import TEXT
count, move = itertools.count(), files._Unfinished.move_to
def moved(self, path):
    if next(count) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    move(self, path)
files._Unfinished.move_to = moved
prepare_events.CHUNK_EVENTS = 100
prepare([sys.argv[2]], sys.argv[3], parse_schema(TEXT), row_group=4)
"""


@pytest.mark.parametrize(
    ("number", "further"),
    [
        pytest.param(30, 90, marks=pytest.mark.slow),
        *(pytest.param(number, 8, marks=pytest.mark.deep) for number in (0, 4, 9, 15)),
    ],
)
def test_a_run_that_is_killed_ends_with_the_same_bits(
    made: Path, events: dict[str, Any], tmp_path: Path, number: int, further: int
) -> None:
    log, out, kills = write_log(tmp_path / "log", events, files=3), tmp_path / "out", 0
    for _ in range(10):  # killed again and again, each time a little further on
        run = subprocess.run(
            [sys.executable, "-c", _KILLED, str(number), str(log), str(out)],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120,
        )  # fmt: skip
        number += further
        if run.returncode == 0:
            break
        assert run.returncode == -signal.SIGKILL
        assert not (out / "manifest.json").exists()
        kills += 1
    assert run.returncode == 0
    assert kills > 0
    assert shards_of(out) == shards_of(made)
    assert not list(out.rglob(".unfinished*"))


def damaged(column: str, row: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(columns: dict[str, Any]) -> None:
        columns[column] = list(map(str, columns[column]))
        columns[column][row] = value

    return change


DAMAGES = [
    (damaged("who", 4, ""), "bad id", "line 6: expected an id of 1 to 64 char.* column who"),
    (damaged("who", 4, "x" * 65), "bad id", "line 6: expected an id of 1 to 64 characters"),
    (damaged("what", 4, "i99"), "unknown item", "line 6: expected an id in column what"),
    (damaged("when", 4, "yesterday"), "bad time", r"line 6: expected a time .* got 'yesterday'"),
    (damaged("when", 4, "2026-02-30"), "bad time", "line 6: expected a time from 1970 to 2200"),
    (damaged("when", 4, "-5"), "bad time", "line 6: expected a time from 1970 to 2200"),
    (damaged("left", 4, "perhaps"), "bad flag", r"line 6: expected true or false .* 'perhaps'"),
    (damaged("price", 4, "101"), "bad number", r"line 6: expected a number from 0 to 100"),
    (damaged("price", 4, "nan"), "bad number", r"line 6: expected a number from 0 to 100"),
    (damaged("device", 4, "tv"), "bad name", "line 6: expected one of phone, desk in column"),
    (damaged("price", 4, "1,2"), "fields", "line 6: expected 6 fields, got 7"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "message"), DAMAGES, ids=lambda d: str(d)[:30])
def test_a_damaged_row_is_left_out_and_told(
    events: dict[str, Any], tmp_path: Path, change: Any, kind: str, message: str
) -> None:
    columns = {name: list(values) for name, values in events.items()}
    change(columns)
    log = write_log(tmp_path / "log", columns)
    found = prepare([log], tmp_path / "out", SCHEMA)
    assert {k: n for k, n in found.counts.items() if "sessions" not in k} == {kind: 1}
    with pytest.raises(DataError, match=rf"visits_0\.csv, {message}") as caught:
        prepare([log], tmp_path / "out", SCHEMA, strict=True)
    assert str(caught.value) == found.examples[kind][0]
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not list((tmp_path / "out").rglob(".unfinished*"))


def test_repeated_events_and_damaged_files(events: dict[str, Any], tmp_path: Path) -> None:
    twice = {name: [*values, values[0]] for name, values in events.items()}
    log = write_log(tmp_path / "log", twice)
    assert prepare([log], tmp_path / "out", SCHEMA).counts["duplicate event"] == 1
    line = len(twice["who"]) + 1
    with pytest.raises(DataError, match=rf"visits_0\.csv, line {line}: expected each item"):
        prepare([log], tmp_path / "out", SCHEMA, strict=True)
    pq_log = write_log(tmp_path / "pq", events, "parquet")
    path = pq_log / "visits_0.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"visits_0\.parquet: expected a whole parquet file"):
        prepare([pq_log], tmp_path / "out2", SCHEMA)
    path.write_bytes(whole)
    table = pq.read_table(path)
    write_table(table.drop(["left"]), path)
    with pytest.raises(DataError, match=r"expected the columns .* none named left"):
        prepare([pq_log], tmp_path / "out2", SCHEMA)
    numbers = pa.array([[1]] * len(table))
    write_table(table.set_column(3, "left", numbers), path)
    with pytest.raises(DataError, match=r"column left to hold true or false, got the type list"):
        prepare([pq_log], tmp_path / "out2", SCHEMA)
    nulls = pa.array([None, *table["left"].to_pylist()[1:]])
    write_table(table.set_column(3, "left", nulls), path)
    with pytest.raises(DataError, match=r"visits_0\.parquet, row 1: expected true or false"):
        prepare([pq_log], tmp_path / "out2", SCHEMA, strict=True)
    path.unlink()
    with pytest.raises(DataError, match=r"expected a visits\*\.csv \(or \.csv\.gz, \.parquet"):
        prepare([pq_log], tmp_path / "out2", SCHEMA)


def test_shards_in_the_folder_of_the_log_are_no_part_of_it(
    events: dict[str, Any], tmp_path: Path
) -> None:
    schema = parse_schema(TEXT.replace('"visits*"', '"*visits*"'))  # as the checked rows are named
    log = write_log(tmp_path / "log", events, "parquet", files=2)
    for _ in range(2):
        prepare([log], log / "out", schema)
    apart = write_log(tmp_path / "apart", events, "parquet", files=2)
    prepare([apart], tmp_path / "out", schema)
    assert shards_of(log / "out").keys() == shards_of(tmp_path / "out").keys()
    assert rows_of(log / "out") == rows_of(tmp_path / "out")


def test_a_damaged_arrow_file_ends_no_process(events: dict[str, Any], tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", events, "arrow")
    path = log / "visits_0.arrow"
    whole = path.read_bytes()
    names = "".join(events["who"]).encode()
    start = whole.index(names)
    lengths = np.array([0, *(len(name) for name in events["who"])])
    offsets = np.cumsum(lengths).astype(np.int32).tobytes()
    for place in (whole.index(offsets) + 40, start + 1):  # an offset, and a byte of a text
        path.write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
        with pytest.raises(DataError, match=r"visits_0\.arrow: expected a whole arrow file"):
            prepare([log], tmp_path / "out", SCHEMA)
    assert not list((tmp_path / "out").rglob(".unfinished*"))


def test_files_without_rows(events: dict[str, Any], tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", events)
    (log / "visits_1.csv").write_text((log / "visits_0.csv").read_text().splitlines()[0] + "\n")
    (log / "wanted.csv").write_text("who,what,since\n")
    prepare([log], tmp_path / "out", SCHEMA)
    rows = rows_of(tmp_path / "out")
    assert rows.keys() == sessions_by_hand(events).keys()
    assert not any(row["wanted"] for own in rows.values() for row in own)
    (log / "visits_0.csv").unlink()
    with pytest.raises(DataError, match=r"visits_1\.csv: expected events, got none that is valid"):
        prepare([log], tmp_path / "out", SCHEMA)


def test_a_failed_sort_says_where_and_what_to_do(
    events: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(database, "MEMORY", "1KB")
    log = write_log(tmp_path / "log", events)
    with pytest.raises(DataError, match=r"users\.parquet: expected duckdb to sort into this file"):
        prepare([log], tmp_path / "out", SCHEMA)
    assert not list((tmp_path / "out").rglob(".unfinished*"))
    assert not (tmp_path / "out" / ".duckdb").exists()


def test_without_duckdb_the_error_says_what_to_install(
    events: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(DataError, match=r'pip install "maskmoe_kernels\[sessions\]"'):
        database.check_duckdb()
    log = write_log(tmp_path / "log", events)
    with pytest.raises(DataError, match="events are sorted and joined by duckdb"):
        prepare([log], tmp_path / "out", SCHEMA)


# --- Slices and users ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def sliced(events: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sliced")
    prepare([write_log(folder / "log", events)], folder / "out", SLICED, row_group=4)
    return folder / "out"


def slices(loader: SessionLoader) -> dict[str, tuple[int, list[float]]]:
    """Session id -> where its slice begins, and all that is in the slice's first half."""
    found = {}
    for batch in loader:
        assert batch.offset is not None
        for b, name in enumerate(batch.session_ids):
            assert name not in found
            found[name] = int(batch.offset[b]), batch.first[b].flatten().tolist()
    return found


def loader_of(out: Path, seed: int = 3, workers: int = 0, **ranks: int) -> SessionLoader:
    data = SessionDataset(Shards(out, "train"), 8, seed=seed, pool=2, **ranks)
    return SessionLoader(data, workers=workers)


def test_each_epoch_draws_another_slice_by_seed_epoch_and_session(sliced: Path) -> None:
    loader = loader_of(sliced)
    first, second = slices(loader), slices(loader)
    assert first.keys() == second.keys()
    assert len(first) == len(Shards(sliced, "train"))
    rows = rows_of(sliced)
    long = [name for name in first if len(rows[name]) > 6]
    assert sum(first[name] != second[name] for name in long) > len(long) / 2
    for name, (offset, _) in (*first.items(), *second.items()):
        assert 0 <= offset <= max(len(rows[name]) - 6, 0)
    shared = {}
    for rank in range(2):  # over ranks and workers: the same slices, each once
        part = slices(loader_of(sliced, rank=rank, world=2))
        assert not shared.keys() & part.keys()
        shared |= part
    assert shared == first
    assert slices(loader_of(sliced, seed=4)) != first
    resumed = loader_of(sliced)
    for _ in resumed:
        break
    rest = loader_of(sliced)
    rest.load_state_dict(resumed.state_dict())
    assert slices(rest).items() <= first.items()


def test_slices_hold_consecutive_rows(sliced: Path) -> None:
    rows = rows_of(sliced)
    for batch in loader_of(sliced):
        assert batch.offset is not None
        for b, name in enumerate(batch.session_ids):
            begin = int(batch.offset[b])
            wanted = rows[name][begin : begin + 6]
            half = len(wanted) // 2
            assert int((~batch.first_padding[b]).sum()) == half
            labels = [float(row["left"]) for row in wanted]
            given = batch.first[b, :half, SLICED.label_column].tolist()
            assert given + batch.target[b, : len(wanted) - half].tolist() == labels
            assert batch.first[b, :half, 1].tolist() == pytest.approx(
                [(k + 1) / 10 for k in range(half)], rel=1e-6, abs=1e-6
            )


def test_users_without_sessions_in_training_are_unknown(sliced: Path) -> None:
    shards = Shards(sliced, "train")
    trained = {row["user"] for path in (sliced / "train").glob("*.parquet")
               for row in pq.read_table(path).to_pylist()}  # fmt: skip
    assert shards.users is not None
    assert shards.users[1].nonzero()[0].tolist() == sorted(trained)
    assert shards.embedded == 1 + len(shards.users[1])
    rows = rows_of(sliced)
    unknown = total = 0
    loader = loader_of(sliced)
    for _ in range(8):
        for batch in loader:
            assert batch.user is not None
            for name, user in zip(batch.session_ids, batch.user.tolist(), strict=True):
                assert user in (0, rows[name][0]["user"] + 1)
                unknown, total = unknown + (user == 0), total + 1
    assert 0.02 < unknown / total < 0.13  # one in 16 is made unknown
    for batch in SessionDataset(Shards(sliced, "test"), 8):
        assert batch.user is not None
        for name, user in zip(batch.session_ids, batch.user.tolist(), strict=True):
            own = rows[name][0]["user"]
            assert user == (own + 1 if own in trained else 0)


def test_other_groups_and_experts_need_no_other_shards(
    made: Path, events: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(prepare_events, "CHUNK_EVENTS", 100)
    log, out = write_log(tmp_path / "log", events, files=3), tmp_path / "out"
    prepare([log], out, SCHEMA, row_group=4)
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")}
    text = TEXT.replace('all = ["given"', 'some = ["given", "past"]\nall = ["given"')
    prepare([log], out, parse_schema(text), row_group=4)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")} == times
    assert list(Shards(out, "train").schema.experts) == ["given", "past", "who", "some", "all"]
    longer = parse_schema(TEXT.replace("shortest = 2", "shortest = 4"))
    assert sum(prepare([log], out, longer, row_group=4).sessions.values()) < len(rows_of(made))
    nothing = parse_schema(TEXT.replace("shortest = 2", "shortest = 40"))
    with pytest.raises(DataError, match="expected sessions, got none that is whole"):
        prepare([log], out, nothing, row_group=4)
    assert not (out / "manifest.json").exists()


def test_records_name_what_they_are_of(made: Path) -> None:
    names = {path.name for path in (made / "logs").glob("part-*.json")}
    assert len(names) > 2
    record = json.loads((made / "logs" / "part-00000.json").read_text())
    assert record["from"]["end"] >= 100
    assert chunk.SORTED_FOLDER == "sorted"
