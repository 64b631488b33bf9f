"""The stream of sessions: what a batch holds, that each session comes once, and resuming."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Iterator
from datetime import date, timedelta
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.skip.data.generator import Settings, generate
from maskmoe_kernels.experiments.skip.data.mssd import prepare
from maskmoe_kernels.experiments.skip.data.mssd_columns import (
    CONTEXT_TYPES,
    END_NAMES,
    END_REASONS,
    START_NAMES,
    START_REASONS,
    TRACK_FEATURES,
)
from maskmoe_kernels.experiments.skip.data.schedule import Schedule
from maskmoe_kernels.experiments.skip.data.session_features import (
    FIRST_COLUMNS,
    FIRST_GROUPS,
    HALF,
    READ,
    SECOND_COLUMNS,
    SECOND_GROUPS,
    SKIP_2,
    Rows,
    SessionBatch,
    assemble,
)
from maskmoe_kernels.experiments.skip.data.sessions import SessionDataset, SessionLoader, Shards

SESSIONS = 300
TENSORS = ("first", "second", "target", "first_padding", "second_padding")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 sessions in three log files: 9 row groups of up to 32 train."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("shards")
    generate(source, Settings(SESSIONS, seed=5, tracks=2_000, chunk=100))
    prepare([source], out, row_group=32)
    return out


@pytest.fixture(scope="module")
def shards(folder: Path) -> Shards:
    return Shards(folder, "train")


@pytest.fixture(scope="module")
def rows(folder: Path) -> dict[str, list[dict]]:
    """Session id -> its rows, from the shards of training."""
    found: dict[str, list[dict]] = {}
    for path in sorted((folder / "train").glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            found.setdefault(row["session_id"], []).append(row)
    return found


def loader(shards: Shards, batch_size: int = 16, workers: int = 0, **kwargs: int) -> SessionLoader:
    dataset = SessionDataset(shards, batch_size, **{"pool": 3, "seed": 7} | kwargs)
    return SessionLoader(dataset, workers=workers)


def assert_equal(a: SessionBatch, b: SessionBatch) -> None:
    assert a.session_ids == b.session_ids
    for name in TENSORS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert getattr(a, name).dtype == getattr(b, name).dtype


def assert_same_batches(a: list[SessionBatch], b: list[SessionBatch]) -> None:
    assert len(a) == len(b) > 0
    for one, other in zip(a, b, strict=True):
        assert_equal(one, other)


# --- what a batch holds


def test_groups_have_the_papers_widths() -> None:
    assert list(FIRST_GROUPS.items()) == [
        ("position", 2), ("context", 13), ("interaction", 29), ("popularity", 3), ("music", 26),
    ]  # fmt: skip
    assert list(SECOND_GROUPS.items()) == [("position", 2), ("popularity", 3), ("music", 26)]
    assert len(set(FIRST_COLUMNS)) == 73
    assert len(set(SECOND_COLUMNS)) == 31
    assert FIRST_COLUMNS[SKIP_2] == "skip_2"


def expected_columns(row: dict, tracks: np.ndarray) -> dict[str, float]:
    """One row's features, worked out one by one."""
    day = row["date"].weekday()
    hour = 2 * np.pi * row["hour_of_day"] / 24
    h = "hist_user_behavior_"
    start, end = START_NAMES[row[h + "reason_start"]], END_NAMES[row[h + "reason_end"]]
    names = (
        "skip_1 skip_2 skip_3 not_skipped context_switch no_pause_before_play "
        "short_pause_before_play long_pause_before_play premium"
    )
    values = {name: float(row[name]) for name in names.split()}
    values |= {
        "position": row["session_position"] / 10 - 1,
        "session_length": row["session_length"] / 10 - 1,
        "shuffle": float(row[h + "is_shuffle"]),
        "hour_sin": np.sin(hour),
        "hour_cos": np.cos(hour),
        "weekday_sin": np.sin(2 * np.pi * day / 7),
        "weekday_cos": np.cos(2 * np.pi * day / 7),
        "weekend": float(day >= 5),
        "seeks_forward": np.log(1 + row[h + "n_seekfwd"]),
        "seeks_back": np.log(1 + row[h + "n_seekback"]),
    }
    values |= {n: float(CONTEXT_TYPES[row["context_type"]] == n) for n in CONTEXT_TYPES}
    values |= {f"start_{n}": float(start == n) for n in START_REASONS}
    values |= {f"end_{n}": float(end == n) for n in END_REASONS}
    values["start_other"] = float(start not in START_REASONS)
    values["end_other"] = float(end not in END_REASONS)
    return values | dict(zip(TRACK_FEATURES, tracks[row["track"]].tolist(), strict=True))


def test_batches_hold_what_the_rows_say(shards: Shards, rows: dict[str, list[dict]]) -> None:
    for batch in islice(loader(shards), 4):
        assert (batch.first.shape, batch.second.shape) == (
            (len(batch), 10, 73),
            (len(batch), 10, 31),
        )
        assert {t.dtype for t in (batch.first, batch.second, batch.target)} == {torch.float32}
        for b, name in enumerate(batch.session_ids):
            half = len(rows[name]) // 2
            a, z = rows[name][:half], rows[name][half:]
            assert batch.first_padding[b].tolist() == [t >= len(a) for t in range(HALF)]
            assert batch.second_padding[b].tolist() == [t >= len(z) for t in range(HALF)]
            labels = [float(row["skip_2"]) for row in z]
            assert batch.target[b].tolist() == labels + [0.0] * (HALF - len(z))
            for part, columns, own in (
                (batch.first, FIRST_COLUMNS, a),
                (batch.second, SECOND_COLUMNS, z),
            ):
                assert not part[b, len(own) :].any()
                for t, row in enumerate(own):
                    values = expected_columns(row, shards.tracks)
                    want = [values[column] for column in columns]
                    np.testing.assert_allclose(part[b, t].numpy(), want, rtol=1e-6, atol=1e-6)


def made_up(skip_of_b: bool = False, seeks: int = 0, start: int = 0, end: int = 0) -> pa.Table:
    """A session of 11 tracks, whose B has other interactions and context than its A."""
    h = "hist_user_behavior_"
    a, b = range(5), range(6)
    flags = [n for n in READ if "skip" in n or "pause" in n or n in ("context_switch", "premium")]
    columns: dict[str, list] = {name: [True for _ in a] + [skip_of_b for _ in b] for name in flags}
    columns["session_id"] = ["0_x"] * 11
    columns["session_position"] = list(range(1, 12))
    columns["track"] = list(range(11))
    columns[h + "n_seekfwd"] = columns[h + "n_seekback"] = [0] * 5 + [seeks] * 6
    columns[h + "is_shuffle"] = [False] * 5 + [skip_of_b] * 6
    columns["hour_of_day"] = [3] * 5 + [seeks] * 6
    columns["context_type"] = [1] * 5 + [end % 6] * 6
    columns[h + "reason_start"] = [start] * 5 + [1] * 6
    columns[h + "reason_end"] = [end] * 5 + [2] * 6
    columns["date"] = [date(2018, 7, 14) + timedelta(days=seeks * (i > 4)) for i in range(11)]
    return pa.table(columns)


def test_interactions_and_context_of_b_reach_no_input(shards: Shards) -> None:
    one, other = (
        assemble(Rows.decode(made_up(skip, seeks, 4, 5)), np.arange(1), shards.tracks)
        for skip, seeks in ((False, 0), (True, 9))
    )
    assert torch.equal(one.first, other.first)
    assert torch.equal(one.second, other.second)
    assert one.target.sum() == 0
    assert other.target.tolist() == [[1.0] * 6 + [0.0] * 4]


def test_every_reason_has_its_column(shards: Shards) -> None:
    for names, own, prefix in (
        (START_NAMES, START_REASONS, "start_"),
        (END_NAMES, END_REASONS, "end_"),
    ):
        places = [i for i, column in enumerate(FIRST_COLUMNS) if column.startswith(prefix)]
        for code, name in enumerate(names):
            table = made_up(start=code) if prefix == "start_" else made_up(end=code)
            batch = assemble(Rows.decode(table), np.arange(1), shards.tracks)
            hot = [FIRST_COLUMNS[i] for i in places if batch.first[0, 2, i] == 1]
            assert hot == [prefix + (name if name in own else "other")]
            assert batch.first[0, 2, places].sum() == 1


def test_batches_move_join_and_travel(shards: Shards) -> None:
    one, two = islice(loader(shards), 2)
    joined = SessionBatch.join([one, two])
    assert len(joined) == len(one) + len(two)
    assert torch.equal(joined.second[len(one) :], two.second)
    assert joined.session_ids == one.session_ids + two.session_ids
    assert_equal(pickle.loads(pickle.dumps(one)), one)
    assert one.to("meta").first.device.type == "meta"


# --- each session once


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(
    sizes, st.integers(2, 30), st.integers(1, 6), st.none() | st.integers(0, 9),
    st.integers(0, 3), st.integers(1, 5), st.integers(1, 4),
)  # fmt: skip
def test_shares_divide_an_epoch(
    sizes: list[int], batch: int, pool: int, seed: int | None, epoch: int, world: int, workers: int
) -> None:
    schedule = Schedule(sizes, max(batch, 2 * world), pool, seed, epoch)
    seen: Counter[tuple[int, int]] = Counter()
    numbers = []
    for p in schedule.pools:
        numbers += range(p.first_batch, p.first_batch + p.batches)
        whole = schedule.shares(p, (0, 1), (0, 1))
        shares = [
            schedule.shares(p, (rank, world), (worker, workers))
            for rank in range(world)
            for worker in range(workers)
        ]
        assert {len(share) for share in shares} == {p.batches}  # every rank has equally many
        for k, sessions in enumerate(whole):
            joined = np.concatenate([share[k] for share in shares])
            assert joined.tolist() == sessions.tolist()  # whatever world and workers are
            assert len(sessions) <= schedule.batch_size
            ranks = [
                sum(len(shares[r * workers + w][k]) for w in range(workers)) for r in range(world)
            ]
            assert max(ranks) - min(ranks) <= 1
            assert min(ranks) > 0 or p.sessions < world
        assert max(map(len, whole)) - min(map(len, whole)) <= 1
        begin = np.cumsum(p.sizes) - p.sizes
        for session in np.concatenate(whole).tolist():
            group = int(np.searchsorted(begin, session, side="right")) - 1
            seen[int(p.groups[group]), session - int(begin[group])] += 1
    assert numbers == list(range(schedule.batches))
    assert seen == Counter((g, i) for g, size in enumerate(sizes) for i in range(size))


# Each example reads the shards up to six times; the schedule alone is tested above.
@settings(max_examples=20)
@given(st.integers(2, 70), st.integers(1, 10), st.integers(0, 5), st.integers(0, 4), st.data())
def test_every_session_once_over_ranks_from_any_point(
    shards: Shards, batch: int, pool: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    world = data.draw(st.integers(1, batch // 2))
    ranks = [
        loader(shards, batch, pool=pool, seed=seed, rank=rank, world=world)
        for rank in range(min(world, 4))
    ]
    one = loader(shards, batch, pool=pool, seed=seed)
    one.epoch = epoch
    whole = list(one)
    start = data.draw(st.integers(0, len(whole)))
    state = {**one.state_dict(), "epoch": epoch, "batch": start}
    ids = [name for b in whole for name in b.session_ids]
    assert len(ids) == len(set(ids)) == len(shards)
    parts = []
    for rank in ranks:
        rank.load_state_dict(state)
        parts.append(list(rank))
        assert (rank.epoch, rank.batch) == (epoch + 1, 0)
    assert {len(part) for part in parts} == {len(whole) - start}
    for k, expected in enumerate(whole[start:]):
        joined = SessionBatch.join([part[k] for part in parts])
        if len(ranks) == world:
            assert_equal(joined, expected)
        else:
            assert joined.session_ids == expected.session_ids[: len(joined)]


def test_epochs_and_seeds_have_other_orders(shards: Shards) -> None:
    def order(seed: int | None, epoch: int) -> list[str]:
        it = loader(shards, seed=seed)
        it.epoch = epoch
        return [name for batch in it for name in batch.session_ids]

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert orders[0] == order(0, 0)
    assert order(None, 0) == order(None, 1)
    # In file order, where no seed shuffles.
    table = pa.concat_tables([shards.table(g) for g in range(len(shards.sizes))])
    first = table.filter(pa.compute.equal(table["session_position"], 1))
    assert order(None, 0) == first["session_id"].to_pylist()


def test_batches_mix_the_row_groups_of_a_pool(shards: Shards) -> None:
    schedule = Schedule([500] * 8, 64, 8, 1, 0)
    (pool,) = schedule.pools
    for share in schedule.shares(pool, (0, 1), (0, 1)):
        assert len(np.unique(share // 500)) >= 6
        assert (np.diff(share // 500) >= 0).all()


def test_a_share_decodes_only_the_row_groups_it_touches(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    table = Shards.table

    def note(self: Shards, group: int, *args: object) -> object:
        read.append(group)
        return table(self, group, *args)

    monkeypatch.setattr(Shards, "table", note)
    whole = len(shards.sizes)
    list(SessionDataset(shards, 64, pool=whole, seed=None))
    assert sorted(read) == list(range(whole))
    read.clear()
    list(SessionDataset(shards, 64, pool=whole, seed=3, rank=0, world=4))
    assert len(read) == len(set(read)) <= -(-whole // 4) + 1


# --- the cursor


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_equals_not_having_stopped(shards: Shards, workers: int) -> None:
    straight = loader(shards, workers=workers)
    first, second = list(straight), list(straight)
    for stop in (0, 1, len(first) - 1, len(first), len(first) + 2):
        run, got = loader(shards, workers=workers), []
        passes: Iterator[SessionBatch] = (batch for _ in range(2) for batch in run)
        got += islice(passes, stop)
        state = json.loads(json.dumps(run.state_dict()))  # of plain values
        assert state["epoch"] * len(first) + state["batch"] == stop
        again = loader(shards, workers=2 - workers)  # the number of workers may change
        again.load_state_dict(state)
        while again.epoch < 2:
            got += again
        assert_same_batches(got, first + second)


def test_a_pass_leaves_the_random_state_alone(shards: Shards) -> None:
    state = torch.get_rng_state()
    next(iter(loader(shards)))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_pass_that_is_left_goes_on(shards: Shards) -> None:
    straight, run = loader(shards), loader(shards)
    got = []
    while run.epoch == 0:
        got += islice(run, 3)
    assert_same_batches(got, list(straight))
    assert len(run) == len(list(run))


@pytest.mark.parametrize(
    ("name", "value"),
    [("digest", "0"), ("split", "test"), ("batch_size", 8), ("pool", 9), ("seed", 1)],
)
def test_a_cursor_of_another_stream_is_refused(shards: Shards, name: str, value: object) -> None:
    run = loader(shards)
    before = run.state_dict()
    with pytest.raises(DataError, match=rf"cursor: expected {name} .* got {value!r}\. Resume"):
        run.load_state_dict({**before, "batch": 3, name: value})
    with pytest.raises(DataError, match=rf"got no \['{name}'\]"):
        run.load_state_dict({key: v for key, v in before.items() if key != name})
    assert run.state_dict() == before


# --- what cannot be read


def test_damaged_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected the manifest of prepared shards, got No such"):
        Shards(tmp_path, "train")
    manifest = json.loads((folder / "manifest.json").read_text())
    path = tmp_path / "manifest.json"
    for text, message in (
        ("{", "expected json, got"),
        (json.dumps(manifest | {"format": 0}), "expected format 2, got 0"),
        (json.dumps(manifest), r"log_0\.parquet: expected \d+ bytes, got no such file. Run"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            Shards(tmp_path, "train")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "log_0.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"log_0\.parquet: expected \d+ bytes, got 4 bytes"):
        Shards(tmp_path, "train")
    with pytest.raises(ValueError, match=r"\['train', 'valid', 'test'\], got 'all'"):
        Shards(folder, "all")


def test_bad_arguments(shards: Shards) -> None:
    for kwargs, message in (
        ({"batch_size": 0}, "at least 2 for each of 1, got 0"),
        ({"batch_size": 7, "world": 4}, "at least 2 for each of 4, got 7"),
        ({"rank": 2, "world": 2}, r"one of 0\.\.1 \(world 2\), got 2"),
        ({"pool": 0}, "pool must be at least 1"),
        ({"seed": -1}, "seed at least 0, got 3 and -1"),
    ):
        with pytest.raises(ValueError, match=message):
            loader(shards, **kwargs)


def test_find(shards: Shards, rows: dict[str, list[dict]]) -> None:
    name = list(rows)[-1]
    batch, table = shards.find(name)
    (expected,) = (b for b in loader(shards, 2) if name in b.session_ids)
    k = expected.session_ids.index(name)
    assert torch.equal(batch.first[0], expected.first[k])
    assert torch.equal(batch.target[0], expected.target[k])
    own = [{key: row[key] for key in rows[name][0]} for row in table.to_pylist()]
    assert own == rows[name]
    assert {"track_id", *TRACK_FEATURES} <= set(table.column_names)
    with pytest.raises(DataError, match=r"session 'none' is not among the \d+ sessions of train"):
        shards.find("none")


def test_real_sessions(shared_data: Path, tmp_path: Path) -> None:
    prepare([shared_data / "mssd-sample"], tmp_path, strict=True)
    skips = tracks = 0
    for split in ("train", "valid", "test"):
        for batch in SessionLoader(SessionDataset(Shards(tmp_path, split), 4, seed=0)):
            assert torch.isfinite(batch.first).all()
            skips += int(batch.target.sum() + batch.first[..., SKIP_2].sum())
            tracks += int((~batch.first_padding).sum() + (~batch.second_padding).sum())
    assert (skips, tracks) == (82, 201)
