"""Bad input gets an error that names the column or parameter, what came, and the remedy."""

import numpy as np
import pytest

pytest.importorskip("maskmoe_kernels.estimators", reason="the extra sklearn is not installed")

import pandas as pd

from maskmoe_kernels.estimators import InterpretableClassifier, InterpretableRegressor
from tests.estimators.tables import QUICK, mixed

FRAME, LABELS, SCORE = mixed(40)


def put(column, value, row=5):
    frame = FRAME.astype({column: object}) if isinstance(value, (str, list)) else FRAME.copy()
    frame.at[row, column] = value
    return frame


def twice():
    return pd.concat([FRAME, FRAME[["age"]]], axis=1)


def dates():
    return FRAME.assign(born=pd.Timestamp("2000-01-01"))


def one(value):
    labels = LABELS.astype(object)
    labels[7] = value
    return labels


def sparse():
    return pytest.importorskip("scipy.sparse").csr_matrix(np.eye(40))


def lazy():
    return pytest.importorskip("polars").from_pandas(FRAME).lazy()


#: What is wrong: X, y, other arguments of fit, parameters, and the words of the error.
FIT = {
    "no rows": (FRAME[:0], LABELS[:0], {}, {}, "X has no rows"),
    "no columns": (FRAME[[]], LABELS, {}, {}, "X has no columns"),
    "one row": (FRAME[:1], LABELS[:1], {}, {}, "at least 2 rows .*, got 1"),
    "a single column": (FRAME["age"], LABELS, {}, {}, "single column.*to_frame"),
    "a list": ([1, 2, 3], LABELS[:3], {}, {}, "Reshape your data"),
    "three axes": (np.zeros((4, 2, 2)), LABELS[:4], {}, {}, "dim 3"),
    "sparse": (sparse, LABELS, {}, {}, "dense data is required"),
    "lazy": (lazy, LABELS, {}, {}, r"X\.collect\(\)"),
    "two columns of one name": (twice, LABELS, {}, {}, "columns of the same name; rename.*'age'"),
    "infinity": (put("age", np.inf), LABELS, {}, {}, "column 'age' holds infinity, first in row 5"),
    "dates": (dates, LABELS, {}, {}, "column 'born' holds dates.*weekday"),
    "dates in an array": (
        np.zeros((40, 2), "M8[D]"), LABELS, {}, {}, "X holds dates.*weekday",
    ),
    "text among numbers": (put("age", "old"), LABELS, {}, {}, "'age'.*text and numbers, 'old'"),
    "a list in a cell": (put("town", [1, 2]), LABELS, {}, {}, "column 'town' holds .* of the type"),
    "complex": (np.full((40, 2), 1j), LABELS, {}, {}, "Complex data not supported"),
    "y missing": (FRAME, None, {}, {}, "y to be passed"),
    "y too short": (FRAME, LABELS[:39], {}, {}, "inconsistent numbers of samples"),
    "y of two axes": (FRAME, np.zeros((40, 2)), {}, {}, "should be a 1d array"),
    "one class": (FRAME, LABELS[:1].repeat(40), {}, {}, "one class only"),
    "numbers for classes": (FRAME, SCORE, {}, {}, "Unknown label type: continuous"),
    "a label missing": (FRAME, one(None), {}, {}, "missing labels"),
    "weight below 0": (
        FRAME, LABELS, {"sample_weight": [-1, *[1] * 39]}, {}, "at least 0, got -1 in row 0",
    ),
    "weights all 0": (
        FRAME, LABELS, {"sample_weight": [0] * 40}, {}, "at least one non-zero|above 0, got 0",
    ),
    "weights of other rows": (FRAME, LABELS, {"sample_weight": [1, 2]}, {}, "sample_weight.shape"),
    "a weight missing": (
        FRAME, LABELS, {"sample_weight": [np.nan, *[1] * 39]}, {}, "sample_weight contains NaN",
    ),
    "class weight of no class": (
        FRAME, LABELS, {}, {"class_weight": {"maybe": 1}}, "names 'maybe', which is not among",
    ),
    "class weight below 0": (
        FRAME, LABELS, {}, {"class_weight": {"yes": -1}}, r"class_weight\['yes'\] must be at least",
    ),
    "class weight in words": (
        FRAME, LABELS, {}, {"class_weight": "even"}, "class_weight must be None, 'balanced'",
    ),
    "other subsets": (FRAME, LABELS, {}, {"subsets": "triples"}, "'auto', 'powerset'.*'triples'"),
    "no subsets": (FRAME, LABELS, {}, {"subsets": []}, "list of lists of groups"),
    "a subset that is a name": (FRAME, LABELS, {}, {"subsets": ["age"]}, r"write \['age'\]"),
    "a subset of strangers": (FRAME, LABELS, {}, {"subsets": [["wage"]]}, "names the group 'wage'"),
    "too many experts": (
        FRAME, LABELS, {}, {"max_experts": 3}, "needs 5 experts for 4 groups, and max_experts is 3",
    ),
    "too large a power set": (
        np.random.default_rng(0).normal(size=(40, 11)), LABELS, {}, {"subsets": "powerset"},
        "2,047 experts; join columns",
    ),
    "groups in a list": (FRAME, LABELS, {}, {"groups": ["age"]}, "groups must be None or a dict"),
    "a group that is a name": (FRAME, LABELS, {}, {"groups": {"a": "age"}}, "list of columns"),
    "a group of strangers": (FRAME, LABELS, {}, {"groups": {"a": ["wage"]}}, "'wage', which is no"),
    "a column in two groups": (
        FRAME, LABELS, {}, {"groups": {"a": ["age"], "b": ["age"]}}, "'age' is in the groups",
    ),
    "a group named as a column": (
        FRAME, LABELS, {}, {"groups": {"age": ["town"]}}, "name of a column that it does not hold",
    ),
    "categorical of strangers": (FRAME, LABELS, {}, {"categorical": ["zip"]}, "names 'zip'"),
    "categorical is a name": (FRAME, LABELS, {}, {"categorical": "age"}, r"write \['age'\]"),
    "no units": (FRAME, LABELS, {}, {"units": 0}, "units must be an integer from 1 to 4096, got 0"),
    "half a bag": (FRAME, LABELS, {}, {"n_bags": 0.5}, "n_bags must be None or an integer"),
    "no layers": (FRAME, LABELS, {}, {"layers": 0}, "layers must be None or an integer"),
    "layers, yes": (FRAME, LABELS, {}, {"layers": True}, "layers must be None or an integer"),
    "a wide top": (FRAME, LABELS, {}, {"top_units": "32"}, "top_units must be None or an integer"),
    "no epochs": (FRAME, LABELS, {}, {"max_epochs": 0}, "max_epochs must be None or an integer"),
    "a rate below 0": (FRAME, LABELS, {}, {"learning_rate": -1.0}, "learning_rate must be a num"),
    "all rows held out": (FRAME, LABELS, {}, {"validation_fraction": 1.0}, "validation_fraction"),
    "stopping in words": (FRAME, LABELS, {}, {"early_stopping": "no"}, "'auto', True or False"),
    "no such device": (FRAME, LABELS, {}, {"device": "gpu7"}, "device='gpu7' cannot be used"),
    "a seed in words": (FRAME, LABELS, {}, {"random_state": "x"}, "cannot be used to seed"),
}  # fmt: skip


@pytest.mark.parametrize("case", FIT)
def test_fit_refuses(case):
    x, y, more, parameters, words = FIT[case]
    x = x() if callable(x) else x
    with pytest.raises((ValueError, TypeError), match=f"(?s){words}"):
        InterpretableClassifier(**{**QUICK, **parameters}).fit(x, y, **more)


def test_a_regression_refuses():
    for y, words in (
        (LABELS, "could not convert string"),
        (np.where(SCORE > 1, np.nan, SCORE), "Input y contains NaN"),
        (np.full(40, np.inf), "Input y contains infinity"),
        (np.ones((40, 2)), "MultiOutputRegressor"),
    ):
        with pytest.raises(ValueError, match=words):
            InterpretableRegressor(**QUICK).fit(FRAME, y)


@pytest.fixture(scope="module")
def fitted():
    return InterpretableClassifier(**QUICK).fit(FRAME, LABELS)


#: Rows that do not fit the training rows.
PREDICT = {
    "a column missing": (
        FRAME.drop(columns="age"),
        "(?s)now missing:\n- age.*feature_names_in",
    ),
    "a column too many": (FRAME.assign(wage=1), "(?s)unseen at fit time:\n- wage"),
    "another order": (FRAME[[*FRAME.columns[::-1]]], "same order"),
    "an array of fewer": (np.zeros((2, 3)), "X has 3 features, but .* is expecting 4"),
    "text for numbers": (
        FRAME.assign(age="old"),
        "'age' held numbers .* holds text.*'old'",
    ),
    "numbers for text": (FRAME.assign(town=1.5), "'town' held text .* holds numbers now, 1.5"),
    "infinity": (put("income", -np.inf), "column 'income' holds infinity"),
    "no rows": (FRAME[:0], "X has no rows"),
}


@pytest.mark.parametrize("case", PREDICT)
def test_predict_refuses(case, fitted):
    x, words = PREDICT[case]
    for call in (fitted.predict, fitted.explain):
        with pytest.raises(ValueError, match=words):
            call(x)


def test_explain_refuses(fitted):
    found = fitted.explain(FRAME)
    for call, words in (
        (lambda: fitted.explain(FRAME, of="yes"), "more than two classes"),
        (lambda: fitted.explain(FRAME, tolerance=-1), "tolerance must be a number"),
        (lambda: fitted.explain_global(tolerance=1), "explain\\(X, tolerance"),
        (lambda: found.plot(40), "one of the 40 rows, got 40"),
        (lambda: found.words("first"), "one of the 40 rows"),
        (lambda: fitted.explain_global().plot("wage"), "no picture of 'wage'; groups: .*'age'"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    labels = np.array(["a", "b", "c", "d"] * 10)
    of_four = InterpretableClassifier(**QUICK).fit(FRAME, labels)
    with pytest.raises(ValueError, match="of must be one of the classes"):
        of_four.explain(FRAME, of="e")


def test_partial_fit_refuses_a_class_that_it_was_not_told_of():
    model = InterpretableClassifier(**QUICK).partial_fit(FRAME, LABELS, classes=["no", "yes"])
    with pytest.raises(ValueError, match="the class 'maybe', which is not among"):
        model.partial_fit(FRAME, one("maybe"))
