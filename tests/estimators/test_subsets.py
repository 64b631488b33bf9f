"""Which experts there are: the power set, lists, and the pairs that a screen finds worth it."""

import numpy as np
import pytest

pytest.importorskip("maskmoe_kernels.estimators", reason="the extra sklearn is not installed")

import pandas as pd

from maskmoe_kernels.estimators import InterpretableRegressor
from maskmoe_kernels.estimators.encoder import Encoder
from maskmoe_kernels.estimators.subsets import screened
from maskmoe_kernels.estimators.tables import read_table
from tests.estimators.tables import QUICK


def table(rows=3000, columns=9, seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, columns))
    frame = pd.DataFrame(x, columns=[*"abcdefghi"[:columns]])
    frame["kind"] = random.choice(["u", "v", "w"], rows)
    return frame


def fitted(frame, y, **parameters):
    return InterpretableRegressor(**QUICK | {"max_epochs": 1} | parameters).fit(frame, y)


def test_the_screen_finds_what_adds_up_to_nothing_alone():
    frame = table()
    y = np.sign(frame.a * frame.b) + frame.c * (frame.kind == "u") + 2 * frame.d - frame.e**2
    y += 0.5 * np.random.default_rng(1).normal(size=len(y))
    model = fitted(frame, y)
    kept = {gain.groups for gain in model.pair_gains_ if gain.kept}
    assert kept == {("a", "b"), ("c", "kind")}
    assert [gain.gain for gain in model.pair_gains_] == sorted(
        (gain.gain for gain in model.pair_gains_), reverse=True
    )
    chosen = {*model.family_.subsets.values()}
    assert {*kept, *((name,) for name in frame)} <= chosen
    # Four orders of ten groups: of each, every beginning has an expert.
    names = [*frame.columns]
    assert [sorted(order) for order in model.orders_] == [[*range(10)]] * 4
    for order in model.orders_:
        for size in range(1, 11):
            beginning = {names[n] for n in order[:size]}
            assert tuple(name for name in names if name in beginning) in chosen
    few = fitted(frame, y, max_experts=12)
    assert few.orders_ == []
    assert few.family_.names == [*names, " & ".join(model.pair_gains_[0].groups), "all groups"]


def test_of_noise_no_pair_is_kept():
    frame, weight = table(), np.ones(3000)
    read = read_table(frame)
    encoder = Encoder.fitted(read, {name: [k] for k, name in enumerate(frame)}, weight, 32, 256)
    for seed in range(3):
        y = frame.a + np.random.default_rng(seed).normal(size=len(frame))
        gains = screened(encoder, read, y.to_numpy()[:, None], weight, None)
        assert len(gains) == 45
        assert sum(gain.kept for gain in gains) <= 1  # at three standard deviations


def test_subsets_by_name_and_list():
    frame = table(80, 3)
    y = frame.a
    assert fitted(frame, y).family_.num_experts == 15
    assert fitted(frame, y, max_experts=8).family_.num_experts <= 8
    assert fitted(frame, y, subsets="pairs").family_.num_experts == 11
    assert fitted(frame, y, subsets="singles").family_.num_experts == 5
    own = fitted(frame, y, subsets=[["c", "a"], ["kind"], ["a", "c"]])
    assert [*own.family_.subsets.values()] == [("kind",), ("a", "c"), ("a", "b", "c", "kind")]
    assert own.predict(frame).shape == (80,)


def test_groups_join_columns():
    frame = table(80, 5)
    model = fitted(frame, frame.a, groups={"two": ["e", "kind"], "one": [1]})
    assert [*model.family_.groups] == ["two", "one", "a", "c", "d"]
    expected = frame.assign(e=0.0, kind="u")
    values = [model._values(model._read(x, reset=False)) for x in (frame, expected)]
    sees_two = model.family_.membership[:, 0]
    assert values[0][:, ~sees_two].equal(values[1][:, ~sees_two])
    assert (values[0][:, sees_two] != values[1][:, sees_two]).any(0).all()


def test_names_of_groups_may_be_names_of_pairs():
    frame = table(60, 3).rename(columns={"c": "a & b", "kind": "all groups"})
    model = fitted(frame, frame.a)
    assert model.family_.num_experts == 15
    assert len({*model.family_.subsets.values()}) == 15
