"""Columns become codes: piecewise-linear ones of numbers, embedding rows of categories."""

import json

import numpy as np
import pytest

pytest.importorskip("maskmoe_kernels.estimators", reason="the extra sklearn is not installed")

from maskmoe_kernels.estimators.columns import (
    MISSING,
    UNSEEN,
    CategoricalColumn,
    NumericColumn,
    column_from_json,
)


def numeric(x, bins=4, weight=None):
    x = np.asarray(x, dtype=float)
    weight = np.ones(len(x)) if weight is None else np.asarray(weight, dtype=float)
    return NumericColumn.fitted("x", x, weight, bins)


def raw(column, x):
    """Codes before their mean is taken away."""
    return column.codes(np.asarray(x, dtype=float))[:, :-1] + column.mean.astype(np.float32)


def test_codes_are_piecewise_linear_between_quantiles():
    column = numeric(np.arange(101))
    assert column.edges.tolist() == [0, 25, 50, 75, 100]
    expected = [[0, 0, 0, 0], [0.4, 0, 0, 0], [1, 1, 0.2, 0], [1, 1, 1, 1]]
    assert raw(column, [-5, 10, 55, 300]) == pytest.approx(np.array(expected), abs=1e-6, rel=0)


def test_codes_have_the_mean_zero_over_the_training_rows():
    x = np.random.default_rng(0).lognormal(size=500)
    weight = np.random.default_rng(1).random(500)
    codes = numeric(x, 16, weight).codes(x)
    assert np.average(codes, axis=0, weights=weight) == pytest.approx(0, abs=1e-6)
    assert codes.std(0)[:-1].min() > 0.01  # they do tell rows apart


def test_any_function_of_few_values_is_linear_in_the_codes():
    x = np.repeat([1.0, 2, 5, 9], 10)
    codes = np.column_stack([numeric(x, 8).codes(x), np.ones(len(x))])
    wanted = np.repeat([3.0, -1, 4, 0.5], 10)
    fit = codes @ np.linalg.lstsq(codes, wanted, rcond=None)[0]
    assert fit == pytest.approx(wanted, abs=1e-5)


def test_heavy_values_have_codes_of_their_own_and_do_not_eat_the_edges():
    random = np.random.default_rng(0)
    x = np.concatenate([np.zeros(900), random.uniform(10, 20, 100)])
    column = numeric(x, 4)
    assert column.heavy.tolist() == [0]
    assert len(column.edges) == 6  # four bins between 10 and 20, and the way there from 0
    assert raw(column, [0, 15])[:, -1].tolist() == [1, 0]
    assert np.diff(column.edges[1:]) == pytest.approx(2.5, rel=0.3, abs=0)


def test_missing_is_a_code_of_its_own_and_the_mean_of_the_others():
    column = numeric([1, 2, 3, np.nan, 4])
    codes = column.codes(np.array([np.nan, 2.0]))
    assert codes[0].tolist() == [0] * (column.width - 1) + [1]
    assert codes[1, -1] == 0
    assert column.missing == pytest.approx(0.2, rel=1e-12, abs=0)


@pytest.mark.parametrize("x", [[7.0, 7, 7], [np.nan, np.nan]])
def test_a_column_that_says_nothing_has_the_missing_code_alone(x):
    column = numeric(x)
    assert column.width == 1
    assert column.codes(np.array([7.0, -1, np.nan]))[:, 0].tolist() == [0, 0, 1]


def test_a_weight_is_as_good_as_rows():
    x = np.random.default_rng(3).normal(size=80).round(1)
    times = np.random.default_rng(4).integers(1, 5, 80)
    a, b = numeric(np.repeat(x, times), 8), numeric(x, 8, times)
    assert np.array_equal(a.edges, b.edges)
    assert a.mean == pytest.approx(b.mean, abs=1e-12)


def test_categories_are_rows_by_frequency():
    x = np.array(["b", "a", "b", None, "c", "b", "a"], dtype=object)
    column = CategoricalColumn.fitted("x", x, np.ones(7), 2)
    assert column.categories == ("b", "a")
    new = np.array(["a", "b", "c", "strange", None], dtype=object)
    assert column.ids(new).tolist() == [3, 2, UNSEEN, UNSEEN, MISSING]
    assert column.share.tolist() == pytest.approx([1 / 7, 1 / 7, 3 / 7, 2 / 7], rel=1e-12, abs=0)


@pytest.mark.parametrize("kind", ["numbers", "categories"])
def test_json_and_back(kind):
    text = np.array(["b", "a", None], dtype=object)
    column = (
        numeric([0, 0, 0, 1.5, np.nan, 3], 2)
        if kind == "numbers"
        else CategoricalColumn.fitted("x", text, np.ones(3), 9)
    )
    record = json.loads(json.dumps(column.to_json()))
    back = column_from_json(record)
    assert back.to_json() == column.to_json()
    if kind == "numbers":
        x = np.array([0, 1, np.nan, 9])
        assert np.array_equal(back.codes(x), column.codes(x))
        record["mean"].pop()
    else:
        assert back.ids(text).tolist() == column.ids(text).tolist()
        record["share"].pop()
    with pytest.raises(ValueError, match="column 'x'"):
        column_from_json(record)
