"""``maskmoe_kernels.estimators`` beside EBM, gradient boosting and linear models, on real tables.

All models of a table are fitted in one process with one thread, as they come, and asked about the
same held-out rows; seconds are those of the processor. ``python -m bench estimators``.

The tables, none of which is in this repository: breast cancer Wisconsin, wine and digits
(scikit-learn; UCI, CC BY 4.0), diabetes (scikit-learn; Efron et al., 2004), Fair's survey and the
RAND health insurance experiment (statsmodels; both in the public domain).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from bench.machine import machine
from maskmoe_kernels.errors import BackendError, DataError
from maskmoe_kernels.experiments.shared.output import Column, print_line, print_record, print_table
from maskmoe_kernels.experiments.shared.report import write_json

NAME = "estimators.json"
OURS, EBM, BOOSTED, LINEAR = "ours", "EBM", "HistGradientBoosting", "linear"
#: Seconds of the processor after which a fit of EBM is given up.
LIMIT = 1800
_LIBRARIES = ("scikit-learn", "interpret-core", "statsmodels", "pandas", "numpy")


@dataclass(frozen=True)
class RealTable:
    """Rows of a real data set.

    Attributes:
        metric: ``"auc"``, ``"accuracy"`` or ``"r2"``.
        x: DataFrame.
        y: ``(rows,)``.
    """

    metric: str
    x: Any
    y: Any


def _of_sklearn(name: str, metric: str) -> RealTable:
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")(as_frame=True)
    return RealTable(metric, bunch.data, bunch.target.to_numpy())


def _fair() -> RealTable:
    import statsmodels.datasets.fair as fair

    frame = fair.load_pandas().data
    return RealTable("auc", frame.drop(columns="affairs"), (frame["affairs"] > 0).to_numpy(int))


def _randhie() -> RealTable:
    import statsmodels.datasets.randhie as randhie

    data = randhie.load_pandas()
    return RealTable("r2", data.exog, np.log1p(data.endog.to_numpy()))


TABLES: dict[str, Callable[[], RealTable]] = {
    "breast_cancer": lambda: _of_sklearn("breast_cancer", "auc"),
    "diabetes": lambda: _of_sklearn("diabetes", "r2"),
    "fair": _fair,
    "randhie": _randhie,
    "wine": lambda: _of_sklearn("wine", "accuracy"),
    "digits": lambda: _of_sklearn("digits", "accuracy"),
}


def run(
    tables: Sequence[str],
    models: Sequence[str],
    splits: int,
    max_epochs: int | None,
    out: Path,
    console: Console,
    resume: bool = False,
) -> dict[str, Any]:
    """Fit all models to each table; write ``estimators.json`` after each fit.

    Args:
        tables: Of :data:`TABLES`.
        models: Of ours, EBM, HistGradientBoosting and linear.
        splits: Random splits into 75 % training rows and 25 % test rows.
        max_epochs: Of ours; ``None``: its default.
        out: Folder of the result.
        console: Where the table goes.
        resume: Keep the fits that the file has, if they are of the same versions.

    Raises:
        BackendError: scikit-learn is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise BackendError("bench estimators needs pip install 'maskmoe_kernels[sklearn]'")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    document: dict[str, Any] = {
        "machine": machine("cpu"),
        "versions": {name: _version(name) for name in _LIBRARIES},
        "splits": splits,
        "fits": [],
    }
    if resume:
        document["fits"] = _kept(out / NAME, document["versions"])
    done = {(fit["table"], fit["model"], fit["split"]) for fit in document["fits"]}
    try:
        for name in models:
            _warm_up(name)
        for split in range(splits):
            for name in tables:
                try:
                    table = TABLES[name]()
                except ImportError as error:
                    print_line(console, f"{name}: {error.name} is not installed")
                    continue
                for model in models:
                    if (name, model, split) in done:
                        continue
                    record = {"table": name, "rows": len(table.y), "columns": table.x.shape[1]}
                    record |= _measure(table, model, split, max_epochs)
                    document["fits"].append(record)
                    document["summary"] = summary(document["fits"])
                    write_json(out / NAME, document)
                    print_record(console, *_in_words(record))
    finally:
        torch.set_num_threads(threads)
    _print(document, console)
    print_line(console, f"results: {out / NAME}")
    return document


def _kept(path: Path, versions: dict[str, Any]) -> list[dict[str, Any]]:
    """The fits that a file of these versions has.

    Raises:
        DataError: It is of other versions.
    """
    before = json.loads(path.read_text("utf-8"))
    if before["versions"] != versions:
        raise DataError(
            f"{path}: is of {before['versions']}, and here are {versions}; start again with "
            "--overwrite"
        )
    return [fit for fit in before["fits"] if "unavailable" not in fit]


def _warm_up(name: str) -> None:
    """Fit a model to a few rows: what it imports at first use is not measured."""
    x = np.arange(80.0).reshape(40, 2)
    for y in (np.arange(40) % 2, np.arange(40.0)):
        with contextlib.suppress(ImportError):
            _made(name, y.dtype.kind == "f", 0, 1).fit(x, y)


class _OutOfTime(Exception):
    """A fit took longer than :data:`LIMIT`."""


def _stop_at(end: float) -> Callable[..., bool]:
    def stop(*_: Any) -> bool:
        if time.process_time() > end:
            raise _OutOfTime
        return False

    return stop


def _measure(table: RealTable, name: str, split: int, max_epochs: int | None) -> dict[str, Any]:
    from sklearn.model_selection import train_test_split

    record: dict[str, Any] = {"model": name, "split": split, "metric": table.metric}
    regression = table.metric == "r2"
    try:
        model = _made(name, regression, split, max_epochs)
    except ImportError as error:
        return record | {"unavailable": f"{error.name} is not installed"}
    kept = {"test_size": 0.25, "random_state": split, "stratify": None if regression else table.y}
    x, x_test, y, y_test = train_test_split(table.x, table.y, **kept)
    start = time.process_time()
    if name == EBM:
        model.set_params(callback=_stop_at(start + LIMIT))
    try:
        model.fit(x, y)
    except _OutOfTime:
        return record | {"unfinished": f"after {LIMIT} s"}
    fitted = time.process_time() - start
    return record | {"score": _score(table.metric, model, x_test, y_test), "seconds": fitted}


def _made(name: str, regression: bool, seed: int, max_epochs: int | None) -> Any:
    from sklearn import ensemble, linear_model, pipeline, preprocessing

    from maskmoe_kernels import estimators

    kind = "Regressor" if regression else "Classifier"
    if name == OURS:
        ours = getattr(estimators, f"Interpretable{kind}")
        return ours(random_state=seed, max_epochs=max_epochs)
    if name == EBM:
        from interpret import glassbox

        return getattr(glassbox, f"ExplainableBoosting{kind}")(random_state=seed, n_jobs=1)
    if name == BOOSTED:
        return getattr(ensemble, f"HistGradientBoosting{kind}")(random_state=seed)
    linear = (
        linear_model.RidgeCV() if regression else linear_model.LogisticRegression(max_iter=2000)
    )
    return pipeline.make_pipeline(preprocessing.StandardScaler(), linear)


def _score(metric: str, model: Any, x: Any, y: Any) -> float:
    from sklearn.metrics import accuracy_score, r2_score, roc_auc_score

    if metric == "auc":
        return float(roc_auc_score(y, model.predict_proba(x)[:, 1]))
    return float((accuracy_score if metric == "accuracy" else r2_score)(y, model.predict(x)))


def summary(fits: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A record a table: mean score and seconds of each model over the splits it was fitted to.

    ``gain`` is our score less EBM's, ``times_as_fast`` EBM's seconds by ours, over the splits of
    both.
    """
    found = []
    for table in dict.fromkeys(fit["table"] for fit in fits):
        own = [fit for fit in fits if fit["table"] == table and "score" in fit]
        record: dict[str, Any] = {"table": table, "models": {}}
        for model in dict.fromkeys(fit["model"] for fit in own):
            of_model = [fit for fit in own if fit["model"] == model]
            record["models"][model] = {
                "score": float(np.mean([fit["score"] for fit in of_model])),
                "seconds": float(np.mean([fit["seconds"] for fit in of_model])),
                "splits": len(of_model),
            }
        pairs = [
            (ours, ebm)
            for ours in own
            for ebm in own
            if (ours["model"], ebm["model"]) == (OURS, EBM) and ours["split"] == ebm["split"]
        ]
        if pairs:
            record["gain"] = float(np.mean([a["score"] - b["score"] for a, b in pairs]))
            record["times_as_fast"] = float(
                sum(b["seconds"] for _, b in pairs) / sum(a["seconds"] for a, _ in pairs)
            )
        found.append(record)
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _in_words(record: dict[str, Any]) -> tuple[str, dict[str, str]]:
    title = f"{record['table']}, split {record['split']}: {record['model']}"
    for reason in ("unavailable", "unfinished"):
        if reason in record:
            return title, {reason: record[reason]}
    return title, {
        record["metric"]: f"{record['score']:.4f}",
        "seconds": f"{record['seconds']:.2f}",
    }


def _print(document: dict[str, Any], console: Console) -> None:
    columns = [Column("table", text=True), Column("model", text=True), Column("score")]
    columns += [Column("s"), Column("splits")]
    rows = [
        [record["table"], model, f"{one['score']:.4f}", f"{one['seconds']:.2f}", str(one["splits"])]
        for record in document.get("summary", [])
        for model, one in record["models"].items()
    ]
    print_table(
        console,
        "Estimators on real tables, one thread",
        columns,
        rows,
        "Score: AUC, accuracy or R2 of held-out rows. Seconds of the processor, of a fit.",
    )
