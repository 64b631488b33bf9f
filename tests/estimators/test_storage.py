"""Models as files: the same answers, no pickle, a clean error for a file that is not one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("maskmoe_kernels.estimators", reason="the extra sklearn is not installed")

import safetensors.torch
import torch

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.estimators import InterpretableClassifier, InterpretableRegressor
from tests.estimators.tables import QUICK, mixed

FRAME, LABELS, SCORE = mixed(120)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    model = InterpretableClassifier(**QUICK, class_weight={"yes": 2, "no": 1}).fit(FRAME, LABELS)
    model.save(path)
    return model, path


def test_a_loaded_classifier_is_the_same(saved):
    model, path = saved
    loaded = InterpretableClassifier.load(path)
    assert np.array_equal(loaded.predict_proba(FRAME), model.predict_proba(FRAME))
    assert np.array_equal(loaded.predict(FRAME), model.predict(FRAME))
    assert loaded.get_params() == model.get_params()
    assert loaded.feature_names_in_.tolist() == [*FRAME.columns]
    a, b = model.explain(FRAME), loaded.explain(FRAME)
    assert a.to_frame().equals(b.to_frame())
    assert torch.equal(loaded.ridge_, model.ridge_)
    assert model.explain_global().to_frame().equals(loaded.explain_global().to_frame())
    with pytest.raises(ValueError, match="now missing:\n- age"):
        loaded.predict(FRAME[["town"]])
    assert loaded.partial_fit(FRAME, LABELS).predict(FRAME).shape == (120,)


@pytest.mark.parametrize("labels", [[3, 1, 2], [2.0, 0.0, -1.0], [False, True], ["ü", "b", "c"]])
def test_labels_of_any_kind_come_back(labels, tmp_path):
    y = np.array([labels[k % len(labels)] for k in range(120)])
    model = InterpretableClassifier(**QUICK | {"random_state": np.random.RandomState(0)})
    model.fit(FRAME.to_numpy(), y).save(tmp_path / "m")
    loaded = InterpretableClassifier.load(tmp_path / "m")
    assert loaded.classes_.dtype == model.classes_.dtype
    assert np.array_equal(loaded.predict(FRAME.to_numpy()), model.predict(FRAME.to_numpy()))
    assert loaded.explain(FRAME.to_numpy()).base == pytest.approx(
        model.explain(FRAME.to_numpy()).base, abs=0
    )


def test_parameters_that_changed_after_fit_do_not_break_the_file(tmp_path):
    model = InterpretableRegressor(**QUICK, groups={"who": ["age", "town"]})
    model.fit(FRAME, SCORE).set_params(units=9).save(tmp_path / "m")
    loaded = InterpretableRegressor.load(tmp_path / "m")
    assert loaded.units == 9
    assert np.array_equal(loaded.predict(FRAME), model.predict(FRAME))


def with_header(path, change):
    """The file with another header, and the same tensors."""
    with safetensors.safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(metadata, tensors)
    return safetensors.torch.save(tensors, metadata)


def in_model(change):
    def inside(metadata, tensors):
        record = json.loads(metadata["model"])
        change(record)
        metadata["model"] = json.dumps(record)

    return inside


def first_wider(metadata, tensors):
    name = next(iter(tensors))
    tensors[name] = torch.zeros(3, 3)


CHANGES = {
    "another format": (lambda m, t: m.update(format="x"), "no estimator"),
    "a later version": (lambda m, t: m.update(version="3"), "version 3 of the format"),
    "no model": (lambda m, t: m.pop("model"), "header is damaged"),
    "no json": (lambda m, t: m.update(model="{"), "header is damaged"),
    "a list": (lambda m, t: m.update(model="[]"), "header holds no object"),
    "another class": (
        in_model(lambda r: r.update({"class": "X"})), "of the class X, and this is Interp",
    ),
    "no encoder": (in_model(lambda r: r.pop("encoder")), "parts do not fit.*encoder"),
    "an unknown parameter": (in_model(lambda r: r["parameters"].update(x=1)), "unexpected.*'x'"),
    "a column less": (in_model(lambda r: r["encoder"]["columns"].pop()), "hold every column once"),
    "one class": (in_model(lambda r: r["classes"].update(values=["a"])), "fewer than two classes"),
    "a tensor of another shape": (first_wider, r"shape \(3, 3\)"),
    "a tensor less": (lambda m, t: t.pop(next(iter(t))), "parts do not fit"),
    "a group of strangers": (in_model(lambda r: r["subsets"].append(["x"])), "parts do not fit"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_a_file_that_was_changed_is_refused(case, saved, tmp_path):
    change, words = CHANGES[case]
    path = tmp_path / "changed"
    path.write_bytes(with_header(saved[1], change))
    with pytest.raises(DataError, match=f"changed: .*{words}"):
        InterpretableClassifier.load(path)


def test_a_file_that_is_none_is_refused(saved, tmp_path):
    whole = saved[1].read_bytes()
    for data in (b"", b"PK\x03\x04 not a model", whole[:100], whole[:-1], whole[: len(whole) // 2]):
        (tmp_path / "m").write_bytes(data)
        with pytest.raises(DataError, match="no model of save"):
            InterpretableClassifier.load(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="no such file; save"):
        InterpretableClassifier.load(tmp_path / "nothing")
    with pytest.raises(DataError, match="of the class InterpretableClassifier, and this is"):
        InterpretableRegressor.load(saved[1])


def test_what_cannot_be_saved_leaves_the_old_file(saved, tmp_path):
    model, path = saved
    with pytest.raises(OSError, match="cannot be written"):
        model.save(path / "below")
    before = path.read_bytes()
    labels = np.array([(k % 2,) for k in range(120)] + [None], dtype=object)[:-1]
    odd = InterpretableClassifier(**QUICK).fit(FRAME, LABELS)
    odd.classes_ = labels[:2]
    with pytest.raises(ValueError, match="cannot be saved; name them by text or numbers"):
        odd.save(path)
    assert path.read_bytes() == before


def half(own, descriptor, data):
    own(descriptor, data[: len(data) // 2])


def nothing(own, *arguments):
    pass


def all_of_it(own, *arguments):
    own(*arguments)


#: Which call of a save, what is done of it before the kill, and which file is then there.
MOMENTS = {
    "half of the bytes": ("write", half, "old"),
    "before they are on the disk": ("fsync", nothing, "old"),
    "before the file has its name": ("replace", nothing, "old"),
    "once it has": ("replace", all_of_it, "new"),
}


def killed(save, when=None, call=None, before=None):
    """Run ``save`` in a process of its own and kill it ``when`` (seconds), or in a call of os."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        own, tell = getattr(os, call or "getpid"), os.write

        def stuck(*arguments):
            before(own, *arguments)
            tell(writes, b"x")
            time.sleep(60)

        if call is not None:
            setattr(os, call, stuck)
        else:
            tell(writes, b"x")
        try:
            save()
        finally:
            os._exit(1)
    os.close(writes)
    assert os.read(reads, 1) == b"x"
    os.close(reads)
    time.sleep(when or 0)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


def which(path, models):
    """Of the model that answers as the file does."""
    answer = InterpretableClassifier.load(path).predict_proba(FRAME)
    return [np.array_equal(answer, model.predict_proba(FRAME)) for model in models].index(True)


@pytest.fixture(scope="module")
def two(saved):
    return saved[0], InterpretableClassifier(**QUICK | {"random_state": 1}).fit(FRAME, LABELS)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of threads, at a fork
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process that it forked")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_save_that_is_killed_leaves_the_old_file_or_the_new_one(moment, two, tmp_path):
    old, new = two
    call, done, left = MOMENTS[moment]
    path = tmp_path / "m"
    old.save(path)
    killed(lambda: new.save(path), None, call, done)
    assert which(path, two) == ["old", "new"].index(left)
    unfinished = [file for file in tmp_path.iterdir() if file != path]
    assert len(unfinished) == (left == "old")
    new.save(path)  # and takes away what the killed one left
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process that it forked")
def test_saves_that_are_killed_at_any_time_leave_a_whole_file(two, tmp_path):
    path = tmp_path / "m"
    two[0].save(path)

    def save():
        while True:
            for model in reversed(two):
                model.save(path)

    waits = np.random.default_rng(0).uniform(0, 0.05, 20)
    found = []
    for wait in waits:
        killed(save, wait)
        found.append(which(path, two))
    assert {*found} == {0, 1}


@pytest.mark.deep
@pytest.mark.skipif(os.name != "posix", reason="kills a process")
@pytest.mark.parametrize("wait", [0.0, 0.3, 1.0])
def test_a_fit_that_is_killed_leaves_no_file(tmp_path, wait):
    code = (
        "from tests.estimators.tables import mixed\n"
        "from maskmoe_kernels.estimators import InterpretableClassifier\n"
        "frame, labels, _ = mixed(3000); print('ready', flush=True)\n"
        "model = InterpretableClassifier(random_state=0, early_stopping=False)\n"
        "model.fit(frame, labels).save('model')"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "TMPDIR": str(tmp_path)}
    words = [sys.executable, "-c", code]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(wait)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
