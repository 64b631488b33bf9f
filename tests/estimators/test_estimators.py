"""The two estimators as scikit-learn knows estimators: the contract, weights, seeds, streams."""

import importlib
import sys

import numpy as np
import pytest

pytest.importorskip("maskmoe_kernels.estimators", reason="the extra sklearn is not installed")

from sklearn.base import clone
from sklearn.datasets import make_classification
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator

from maskmoe_kernels.estimators import InterpretableClassifier, InterpretableRegressor
from tests.estimators.tables import QUICK, mixed

BOTH = [InterpretableClassifier, InterpretableRegressor]
#: Fast, and still learns what the checks want to see learned.
CHECKED = {"n_bags": 1, "units": 4, "top_units": 8, "learning_rate": 0.05, "max_epochs": 40}


def check(model):
    found = check_estimator(model, on_skip=None, on_fail=None)
    failed = {r["check_name"]: repr(r["exception"]) for r in found if r["status"] == "failed"}
    assert failed == {}
    passed = [r["check_name"] for r in found if r["status"] == "passed"]
    assert len(passed) > 50
    assert "check_sample_weight_equivalence_on_dense_data" in passed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BOTH)
def test_scikit_learns_contract(kind):
    check(kind(subsets="singles", **CHECKED))


@pytest.mark.deep
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BOTH)
def test_scikit_learns_contract_with_the_defaults(kind):
    check(kind())


def test_learns_from_a_frame_of_all_kinds():
    frame, labels, score = mixed(600)
    test, test_labels, test_score = mixed(600, seed=1)
    model = InterpretableClassifier(n_bags=1, random_state=0).fit(frame, labels)
    assert roc_auc_score(test_labels, model.predict_proba(test)[:, 1]) > 0.95
    assert model.classes_.tolist() == ["no", "yes"]
    assert model.family_.num_experts == 15  # four columns: every subset
    numbers = InterpretableRegressor(n_bags=1, random_state=0).fit(frame, 50 + 9 * score)
    assert r2_score(50 + 9 * test_score, numbers.predict(test)) > 0.85


def test_three_classes():
    x, y = make_classification(500, 8, n_informative=5, n_classes=3, random_state=0)
    model = InterpretableClassifier(n_bags=1, random_state=0).fit(x[:400], y[:400])
    assert model.score(x[400:], y[400:]) > 0.7
    probability = model.predict_proba(x)
    assert probability.sum(1) == pytest.approx(1, abs=1e-12)
    assert np.array_equal(model.classes_[probability.argmax(1)], model.predict(x))
    answer = model.decision_function(x)
    assert answer.sum(1) == pytest.approx(0, abs=1e-9)


def test_a_seed_gives_the_same_bits_and_leaves_torchs_alone():
    import torch

    frame, labels, _ = mixed(200)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = InterpretableClassifier(**QUICK).fit(frame, labels).predict_proba(frame)
    assert torch.equal(torch.get_rng_state(), before)
    again = InterpretableClassifier(**QUICK).fit(frame, labels).predict_proba(frame)
    other = InterpretableClassifier(**QUICK | {"random_state": 1}).fit(frame, labels)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other.predict_proba(frame))


def test_weights_are_repeated_rows_and_a_weight_of_0_is_no_row():
    frame, labels, _ = mixed(200)
    times = np.random.default_rng(0).integers(0, 4, 200)
    rows = np.random.default_rng(1).permutation(np.repeat(np.arange(200), times))
    a = InterpretableClassifier(**QUICK).fit(frame, labels, sample_weight=times)
    b = InterpretableClassifier(**QUICK).fit(frame.iloc[rows], labels[rows])
    assert np.array_equal(a.predict_proba(frame), b.predict_proba(frame))
    c = InterpretableClassifier(**QUICK).fit(frame, labels)
    assert not np.array_equal(a.predict_proba(frame), c.predict_proba(frame))


def test_class_weights_are_weights():
    frame, labels, _ = mixed(200)
    weight = np.where(labels == "yes", 3.0, 1.0)
    of_class = InterpretableClassifier(**QUICK, class_weight={"yes": 3}).fit(frame, labels)
    of_rows = InterpretableClassifier(**QUICK).fit(frame, labels, weight)
    assert np.array_equal(of_class.predict_proba(frame), of_rows.predict_proba(frame))
    balanced = InterpretableClassifier(**QUICK, class_weight="balanced").fit(frame, labels)
    assert balanced.base_ == pytest.approx(0, abs=1e-9)


def test_stops_early_and_keeps_the_best():
    frame, labels, _ = mixed(400)
    noise = np.random.default_rng(0).permutation(labels)
    quick = QUICK | {"max_epochs": 400, "patience": 3, "learning_rate": 0.05}
    (history,) = InterpretableClassifier(**quick).fit(frame, noise).validation_loss_
    assert len(history) < 40
    assert min(history) <= history[-1]
    (history,) = (
        InterpretableClassifier(**quick | {"early_stopping": False, "max_epochs": 4})
        .fit(frame, noise)
        .validation_loss_
    )
    assert history == []


def test_in_pipelines_searches_and_clones():
    frame, labels, _ = mixed(150)
    model = make_pipeline(FunctionTransformer(), InterpretableClassifier(**QUICK))
    search = GridSearchCV(model, {"interpretableclassifier__units": [2, 4]}, cv=2)
    assert search.fit(frame, labels).predict(frame).shape == (150,)
    own = InterpretableRegressor(subsets=[["age"]], **QUICK)
    assert clone(own).get_params() == own.get_params()
    assert len(cross_val_score(own, frame, np.arange(150), cv=2)) == 2


def test_a_stream_of_rows_is_learned():
    model = InterpretableClassifier(n_bags=1, random_state=0, learning_rate=0.02)
    for k in range(12):
        frame, labels, _ = mixed(400, seed=k)
        model.partial_fit(frame, labels, classes=["no", "yes"] if k == 0 else None)
    test, test_labels, _ = mixed(500, seed=99)
    assert roc_auc_score(test_labels, model.predict_proba(test)[:, 1]) > 0.93
    numbers = InterpretableRegressor(**QUICK).partial_fit(frame, np.arange(400.0))
    before = numbers.predict(test)
    assert not np.array_equal(numbers.partial_fit(frame, np.arange(400.0)).predict(test), before)


def test_an_expert_learns_from_its_columns_alone():
    frame, labels, _ = mixed(200)
    model = InterpretableClassifier(**QUICK).fit(frame, labels)
    town = model.family_.names.index("town")
    changed = frame.assign(age=-1.0, income=np.nan, member=True)
    values = [model._values(model._read(x, reset=False))[:, town] for x in (frame, changed)]
    assert values[0].equal(values[1])
    # Through training, too: no other column moves a weight that this expert reads.
    again = InterpretableClassifier(**QUICK | {"early_stopping": False, "subsets": "singles"})
    found = [
        again.fit(x, labels)._values(again._read(x, reset=False))[:, 2] for x in (frame, frame)
    ]
    assert found[0].equal(found[1])
    network = model.networks_[0]
    codes = model.encoder_.codes(model._read(frame, reset=False))
    network.zero_grad()
    network(codes)[:, [model.family_.names.index("age & town")]].sum().backward()
    assert not network.tables[0].grad.any()  # only the expert of town itself trains its rows


def test_categories_that_training_did_not_have_get_the_mean_of_the_others():
    frame, labels, _ = mixed(200)
    frame = frame.assign(town=frame["town"].fillna("Bonn"))
    network = InterpretableClassifier(**QUICK).fit(frame, labels).networks_[0]
    (table,), (column,) = network.tables, network.encoder.tables
    share = column.share[2:]
    expected = share @ table[2:].detach().numpy()
    for row in (0, 1):
        assert table[row].detach().numpy() == pytest.approx(expected, abs=1e-6)


def test_a_missing_library_is_named_with_the_remedy(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("maskmoe_kernels.estimators")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    words = "needs safetensors, which is not installed: pip install 'maskmoe_kernels.sklearn.'"
    with pytest.raises(ModuleNotFoundError, match=words):
        importlib.import_module("maskmoe_kernels.estimators")
