"""fit_batches: what is larger than memory, as batches that come again or as Parquet files."""

import numpy as np
import pytest

pytest.importorskip("maskmoe_kernels.estimators", reason="the extra sklearn is not installed")

import pandas as pd

from maskmoe_kernels.estimators import InterpretableClassifier, InterpretableRegressor, streams
from maskmoe_kernels.estimators.batches import drawn_from
from maskmoe_kernels.estimators.tables import read_table
from tests.estimators.tables import QUICK, mixed

FRAME, LABELS, SCORE = mixed(1200)
PARTS = [slice(first, first + 200) for first in range(0, 1200, 200)]


def batches(y=LABELS):
    return [(FRAME[part], y[part]) for part in PARTS]


def files(folder):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    for k, (x, y) in enumerate(batches()):
        x.assign(buys=y).to_parquet(folder / f"{k}.parquet")
    return folder


def test_a_folder_of_files_a_list_and_a_function_are_the_same_fit(tmp_path):
    models = [
        InterpretableClassifier(**QUICK).fit_batches(files(tmp_path), target="buys"),
        InterpretableClassifier(**QUICK).fit_batches(batches()),
        InterpretableClassifier(**QUICK).fit_batches(lambda: iter(batches())),
    ]
    answers = [model.decision_function(FRAME) for model in models]
    assert np.array_equal(answers[0], answers[1])
    assert np.array_equal(answers[0], answers[2])
    assert models[0].feature_names_in_.tolist() == [*FRAME.columns]


def test_an_index_that_pandas_wrote_is_no_column(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    for k, index in enumerate((FRAME.index[::-1], pd.Index(np.arange(1200) * 7, name="id"))):
        x, folder = FRAME.set_axis(index).assign(buys=LABELS), tmp_path / str(k)
        folder.mkdir()
        x[:400].to_parquet(folder / "0.parquet", index=True)
        model = InterpretableClassifier(**QUICK).fit_batches(folder, target="buys")
        assert model.feature_names_in_.tolist() == [*FRAME.columns]


def test_it_learns_as_well_as_a_fit_in_memory():
    x, labels, score = mixed(1000, seed=9)
    model = InterpretableClassifier(random_state=0, n_bags=1).fit_batches(batches())
    whole = InterpretableClassifier(random_state=0, n_bags=1).fit(FRAME, LABELS)
    assert model.score(x, labels) > whole.score(x, labels) - 0.01
    numbers = InterpretableRegressor(random_state=0, n_bags=1).fit_batches(batches(50 + 9 * SCORE))
    assert numbers.score(x, 50 + 9 * score) > 0.85
    found = numbers.explain(x)
    total = found.contributions.to_numpy().sum(1) + found.base
    assert total == pytest.approx(numbers.predict(x), abs=1e-5)


def test_held_out_rows_train_nothing(monkeypatch):
    """Their labels only tell when to stop: with other ones, all epochs run alike."""
    monkeypatch.setattr(streams, "_DRAWN", 300)
    seen = []
    own = streams.Streamed._later_samples

    def spied(self, batch, start, not_seen):
        samples, count = own(self, batch, start, not_seen)
        seen.append((count, len(samples.target), not_seen))
        return samples, count

    monkeypatch.setattr(streams.Streamed, "_later_samples", spied)
    InterpretableClassifier(**{**QUICK, "max_epochs": 1}).fit_batches(batches())
    held = seen[0][2]
    assert len(held) == 45  # of 300 drawn rows
    assert sum(count for count, _, _ in seen) == 1200
    assert [count - trained for count, trained, _ in seen] == np.histogram(
        held, np.arange(0, 1201, 200)
    )[0].tolist()


def test_weights_count():
    weight = np.where(LABELS == "yes", 1.0, 0.0)
    weight[LABELS == "no"] = 1e-3
    even = InterpretableClassifier(**QUICK).fit_batches(batches())
    parts = [(x, y, weight[part]) for (x, y), part in zip(batches(), PARTS, strict=True)]
    model = InterpretableClassifier(**QUICK).fit_batches(parts)
    assert (model.predict(FRAME) == "yes").mean() > 0.9 > (even.predict(FRAME) == "yes").mean()


def test_rows_are_drawn_evenly_and_remember_their_number():
    tables = [
        read_table(pd.DataFrame({"a": np.arange(k, k + 500.0)})) for k in (0, 500, 1000, 1500)
    ]
    parts = [(table, table.columns[0], np.ones(500)) for table in tables]
    drawn = drawn_from(parts, 400, np.random.default_rng(0))
    assert drawn.total == 2000
    assert np.array_equal(drawn.table.columns[0], drawn.number)
    assert np.array_equal(drawn.y, drawn.number)
    assert len(set(drawn.number.tolist())) == 400
    count = np.histogram(drawn.number, np.arange(0, 2001, 500))[0]
    assert count.min() > 70
    assert (np.diff(drawn.number) < 0).any()  # in a random order


def test_a_column_may_be_missing_in_a_whole_batch():
    parts = batches()
    parts[0] = (parts[0][0].assign(town=np.nan), parts[0][1])
    model = InterpretableClassifier(**QUICK).fit_batches(parts)
    assert model.encoder_.tables[0].name == "town"


def once():
    yield from batches()


def shrinking():
    left = [6, 5]

    def give():
        return iter(batches()[: left.pop(0)])

    return give


def changed(k, **columns):
    parts = batches()
    parts[k] = (parts[k][0].assign(**columns), parts[k][1])
    return parts


REFUSED = {
    "an iterator": (lambda _: once(), None, "come only once.*fit_batches.lambda"),
    "a number": (lambda _: 7, None, "a list of them, got int"),
    "no batch": (lambda _: [], None, "there is no batch"),
    "no pair": (lambda _: [FRAME], None, r"a batch must be \(X, y\).*got DataFrame"),
    "fewer rows later": (lambda _: shrinking(), None, "1200 rows in the first pass and 1000"),
    "text for numbers": (lambda _: changed(2, age="old"), None, "'age' holds numbers in one batch"),
    "other columns": (lambda _: changed(2, wage=1), None, "(?s)batch 2: .*unseen at fit time"),
    "infinity": (lambda _: changed(3, age=np.inf), None, "batch 3: column 'age' holds infinity"),
    "dates": (lambda _: changed(1, age=pd.Timestamp("2000-01-01")), None, "batch 1: .*dates"),
    "short y": (lambda _: [(FRAME, LABELS[:9])], None, "batch 0: .*inconsistent numbers"),
    "one class": (lambda _: batches(np.full(1200, "a")), None, "one class only"),
    "a target of batches": (lambda _: batches(), "buys", "bring their y"),
    "no target": (files, None, "target must name the column"),
    "another target": (files, "sells", "target must name the column that holds y, got 'sells'"),
    "an empty folder": (lambda folder: folder, "buys", "holds no Parquet files"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_fit_batches_refuses(case, tmp_path):
    if case == "an empty folder":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    given, target, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        InterpretableClassifier(**QUICK).fit_batches(given(tmp_path), target=target)


def test_and_files_that_are_none(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        InterpretableClassifier(**QUICK).fit_batches(tmp_path / "none", target="buys")
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        InterpretableClassifier(**QUICK).fit_batches(tmp_path, target="buys")
    model = InterpretableClassifier(**QUICK, class_weight="balanced")
    with pytest.raises(ValueError, match="pass a dict of class to weight"):
        model.fit_batches(batches())
