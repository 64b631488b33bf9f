"""What a batch holds."""

from __future__ import annotations

import pickle
from datetime import date, timedelta
from itertools import islice

import numpy as np
import pyarrow as pa
import torch

from maskmoe_kernels.experiments.skip.data.columns import (
    CONTEXT_TYPES,
    END_NAMES,
    END_REASONS,
    START_NAMES,
    START_REASONS,
    TRACK_FEATURES,
)
from maskmoe_kernels.experiments.skip.data.features import (
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
from maskmoe_kernels.experiments.skip.data.shards import Shards
from tests.experiments.skip.data.batches import assert_equal, loader


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
