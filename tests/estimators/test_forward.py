"""Learned subsets: what forward selection keeps, what it cannot see, and what it says of it."""

import numpy as np
import pytest

pytest.importorskip("maskmoe_kernels.estimators", reason="the extra sklearn is not installed")

import pandas as pd
from sklearn.base import clone

from maskmoe_kernels.estimators import InterpretableClassifier, InterpretableRegressor
from maskmoe_kernels.estimators.forward import _next_level

FORWARD = {"subsets": "forward", "n_bags": 2, "max_epochs": 60, "random_state": 0}


def table(rows, seed=0):
    return pd.DataFrame(np.random.default_rng(seed).normal(size=(rows, 8)), columns=[*"abcdefgh"])


def chosen(model):
    """What selection finds of these rows, without the training that comes after it."""

    def begun(frame, y, sample_weight=None):
        model._check_parameters()
        model._begin(*model._prepared(frame, y, sample_weight))
        return model

    return begun


def kept(model, size=2):
    return {
        found.groups for found in model.subset_gains_ if found.kept and len(found.groups) >= size
    }


@pytest.fixture(scope="module")
def product():
    frame = table(1500)
    y = np.where(frame.a * frame.b > 0, "same", "other")
    return frame, y, InterpretableClassifier(**FORWARD | {"n_bags": 1}).fit(frame, y)


def test_two_columns_that_say_nothing_alone_are_found(product):
    frame, _, model = product
    assert kept(model) == {("a", "b")}
    found = {gain.groups: gain for gain in model.subset_gains_}
    # Alone, a and b leave log 2 nats; together, none.
    assert 0.55 < found["a", "b"].gain < np.log(2) + 3 * found["a", "b"].error
    for groups, gain in found.items():
        if groups != ("a", "b"):
            assert gain.gain < 0.02
    assert model.subset_gains_[0].groups == ("a", "b")
    assert [gain.gain for gain in model.subset_gains_] == sorted(
        (gain.gain for gain in model.subset_gains_), reverse=True
    )
    # The next level extends what was kept, and nothing else.
    assert {groups for groups in found if len(groups) == 3} == {("a", "b", c) for c in "cdefgh"}
    assert kept(model, size=1) == {("a", "b"), *((name,) for name in frame)}


def test_contributions_go_along_orders_that_have_experts(product):
    frame, _, model = product
    subsets = {*model.family_.subsets.values()}
    assert {("a", "b"), tuple(frame), *((name,) for name in frame)} <= subsets
    found = model.explain(frame[:200])
    total = found.contributions.sum(axis=1) + found.base
    assert np.allclose(total, model.decision_function(frame[:200]), atol=1e-5)
    size = found.contributions.abs().mean()
    assert {*size.nlargest(2).index} == {"a", "b"}


def test_a_file_and_a_report_tell_what_was_kept(product, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    frame, _, model = product
    model.save(tmp_path / "model")
    loaded = InterpretableClassifier.load(tmp_path / "model")
    assert loaded.subset_gains_ == model.subset_gains_
    assert loaded.family_.subsets == model.family_.subsets
    assert loaded.orders_ == model.orders_
    assert np.array_equal(loaded.decision_function(frame), model.decision_function(frame))
    whole = loaded.explain_global()
    assert whole.gains == model.subset_gains_
    page = whole.report(tmp_path / "report.html").read_text("utf-8")
    gain = model.subset_gains_[0]
    row = f"<td>a &amp; b</td><td>{gain.gain:.4f} ± {gain.error:.4f}</td><td>kept</td>"
    assert row in page
    assert "1 of 30 subsets" in page
    assert page.count("<td>kept</td>") == 1


def test_a_product_of_three_is_not_seen():
    # No pair of a, b, c says anything, so no level leads to all three: a limit, said in the docs.
    frame = table(1000)
    y = np.sign(frame.a * frame.b * frame.c)
    model = chosen(InterpretableClassifier(**FORWARD))(frame, y)
    assert kept(model) == set()
    assert max(len(found.groups) for found in model.subset_gains_) == 2


def test_what_an_additive_column_adds_is_its_share_of_the_variance():
    frame = table(2500)
    noise = np.random.default_rng(1).normal(size=2500)
    y = 3 + 20 * (2 * frame.a + frame.b + noise)  # shares of the variance: 4/6, 1/6, 1/6
    model = chosen(InterpretableRegressor(**FORWARD))(frame, y)
    assert kept(model) == {("a", "b")}
    found = {gain.groups: gain for gain in model.subset_gains_}
    for groups, share in {("a",): 4 / 6, ("b",): 1 / 6, ("a", "b"): 1 / 6, ("c",): 0}.items():
        assert found[groups].gain == pytest.approx(share, abs=3 * found[groups].error + 0.01)
        assert found[groups].error < 0.05


@pytest.mark.parametrize("seed", [0, 1])
def test_of_noise_nothing_is_kept(seed):
    frame = table(600, seed)
    y = np.random.default_rng(seed + 10).normal(size=600)
    model = chosen(InterpretableRegressor(**FORWARD | {"random_state": seed}))(frame, y)
    assert kept(model) == set()
    assert len(model.subset_gains_) == 8 + 24


def test_max_experts_is_held():
    frame = table(1500)
    y = frame.sum(axis=1)  # every larger subset gains
    few = {"max_epochs": 1, "n_bags": 1}
    for most in (9, 11, 15, 40):
        model = chosen(InterpretableRegressor(**FORWARD | few, max_experts=most))(frame, y)
        assert min(1, most - 9) <= len(kept(model)) <= most - 9
        assert model.family_.num_experts <= most
    by_size = [sum(len(groups) == size for groups in kept(model)) for size in (2, 3, 4)]
    assert by_size == [11, 11, 9]  # a third of the 31 places for each level
    free = chosen(InterpretableRegressor(**FORWARD | few))(frame, y)
    assert len(kept(free, size=1)) == 4 * 8 - 1
    assert len(free.orders_) == 4
    with pytest.raises(ValueError, match=r"'forward' needs 9 experts for 8 groups.*is 8; raise it"):
        InterpretableRegressor(**FORWARD, max_experts=8).fit(frame, y)


def test_the_same_seed_finds_the_same(product):
    frame, y, model = product
    again = chosen(clone(model))(frame, y)
    assert again.subset_gains_ == model.subset_gains_
    assert again.family_.subsets == model.family_.subsets
    # A row of weight 2 is the row twice.
    rows, weight = frame[:300], np.where(np.arange(300) % 3 == 0, 2, 1)
    twice = np.repeat(np.arange(300), weight)
    quick = FORWARD | {"max_epochs": 5}
    weighted = chosen(InterpretableClassifier(**quick))(rows, y[:300], weight)
    repeated = chosen(InterpretableClassifier(**quick))(rows.iloc[twice], y[twice])
    assert weighted.subset_gains_ == repeated.subset_gains_


@pytest.mark.parametrize("labels", [2, 3])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_few_groups_and_more_classes(groups, labels):
    frame = table(300).assign(kind=np.arange(300) % 4).astype({"kind": str})
    frame = frame[["a", "kind", "b"][:groups]]
    y = (frame.a.rank() * labels // 301).to_numpy(int)
    model = InterpretableClassifier(**FORWARD | {"max_epochs": 5, "n_bags": 1}).fit(frame, y)
    gain = {found.groups: found.gain for found in model.subset_gains_}
    assert 0.5 * np.log(labels) < gain["a",] < np.log(labels)  # what the constant answer leaves
    assert max(map(len, gain)) == max(1, groups - 1)  # the one of all groups is there anyway
    found = model.explain(frame, **({"of": 0} if labels == 3 else {}))
    assert np.allclose(found.contributions.sum(axis=1) + found.base, found.answer, atol=1e-5)


def test_streams_and_batches_select_on_the_rows_that_they_begin_with():
    frame = table(600)
    y = 2 * frame.a - 2 * frame.b
    few = FORWARD | {"max_epochs": 10, "n_bags": 1}
    stream = InterpretableRegressor(**few).partial_fit(frame, y)
    assert ("a", "b") in kept(stream)
    batches = [(frame[:300], y[:300]), (frame[300:], y[300:])]
    assert ("a", "b") in kept(InterpretableRegressor(**few).fit_batches(batches))


@pytest.mark.parametrize(("early_stopping", "rows"), [(False, 300), ("auto", 90)])
def test_without_held_out_rows_it_is_refused(early_stopping, rows):
    frame = table(rows)
    model = InterpretableRegressor(**FORWARD, early_stopping=early_stopping)
    words = f"held-out rows.*early_stopping={early_stopping!r} and {rows} different.*at least 100"
    with pytest.raises(ValueError, match=words):
        model.fit(frame, frame.a)


def test_candidates_extend_what_gained_most_and_take_turns_with_the_screen():
    alone = dict(zip("abcd", [0.4, 0.3, 0.2, 0.1], strict=True))
    singles = {(name,): gain for name, gain in alone.items()}
    level = _next_level(alone, singles, [("c", "d"), ("a", "b")])
    assert [*map("".join, level)] == ["cd", "ab", "ac", "ad", "bc", "bd"]
    level = _next_level(alone, {("a", "d"): 0.2, ("a", "b"): 0.1, ("b", "d"): 0.05}, [])
    assert [*map("".join, level)] == ["abd", "acd", "abc", "bcd"]
    wide = {f"g{k}": 1.0 - k / 100 for k in range(10)}
    assert len(_next_level(wide, {(name,): gain for name, gain in wide.items()}, [])) == 30
    assert _next_level({"a": 1.0, "b": 1.0}, {("a",): 1.0, ("b",): 1.0}, [("a", "b")]) == []
