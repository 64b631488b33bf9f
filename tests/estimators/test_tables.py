"""One table, in the clothes of every library."""

import numpy as np
import pytest

pytest.importorskip("maskmoe_kernels.estimators", reason="the extra sklearn is not installed")

import pandas as pd

from maskmoe_kernels.estimators import InterpretableClassifier
from maskmoe_kernels.estimators.tables import CATEGORIES, NUMBERS, read_table
from tests.estimators.tables import QUICK, mixed


def columns_of(table):
    return [
        [None if value is None or value != value else value for value in column.tolist()]
        for column in table.columns
    ]


def other_kinds(frame):
    """The same table of other libraries that are installed."""
    arrow = pytest.importorskip("pyarrow")
    polars = pytest.importorskip("polars")
    yield "pandas category", frame.astype({"town": "category"})
    yield "pandas string", frame.astype({"town": "string", "member": "boolean"})
    yield "arrow", arrow.Table.from_pandas(frame, preserve_index=False)
    of_polars = polars.from_pandas(frame)
    yield "polars", of_polars
    yield "polars categorical", of_polars.with_columns(polars.col("town").cast(polars.Categorical))
    yield "pandas of arrow", of_polars.to_pandas(use_pyarrow_extension_array=True)


def test_all_libraries_give_the_same_columns_and_answers():
    frame, y, _ = mixed(120)
    expected = read_table(frame)
    assert expected.kinds == [NUMBERS, NUMBERS, CATEGORIES, NUMBERS]
    model = InterpretableClassifier(**QUICK).fit(frame, y)
    wanted = model.predict_proba(frame)
    for name, other in other_kinds(frame):
        found = read_table(other)
        assert (found.names, found.kinds) == (expected.names, expected.kinds), name
        assert columns_of(found) == columns_of(expected), name
        assert np.array_equal(model.predict_proba(other), wanted), name
        again = InterpretableClassifier(**QUICK).fit(other, y)
        assert np.array_equal(again.predict_proba(frame), wanted), name
        assert again.feature_names_in_.tolist() == [*frame.columns]


def test_an_array_of_objects_has_columns_of_both_kinds():
    array = np.array([[1, "a", None], [2.5, None, True], [np.nan, "b", False]], dtype=object)
    table = read_table(array)
    assert table.kinds == [NUMBERS, CATEGORIES, NUMBERS]
    assert columns_of(table) == [[1, 2.5, None], ["a", None, "b"], [None, 1, 0]]
    assert table.labels is None


def test_numbers_that_name_categories():
    frame = pd.DataFrame({"zip": [53111.0, np.nan, 101], "size": [1, 2, 3]})
    table = read_table(frame, categorical=["zip"])
    assert table.kinds == [CATEGORIES, NUMBERS]
    assert columns_of(table)[0] == ["53111", None, "101"]
    assert columns_of(read_table(frame, categorical=[0]))[0] == ["53111", None, "101"]
    of_categories = read_table(pd.DataFrame({"x": pd.Categorical([3, 1, 3])}))
    assert columns_of(of_categories) == [["3", "1", "3"]]
