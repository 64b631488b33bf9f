"""Shapley values of ours and of shap and shapiq, against values that are known.

Rivals explain the true E[y | x], which nobody has: all their error is of the explanation. Ours
learn from samples, and their error is that of learning and explaining. ``python -m bench shapley``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from bench.machine import machine
from bench.networks.gaussian_truth import GaussianTask, errors, train
from maskmoe_kernels.experiments.shared.output import Column, print_line, print_table
from maskmoe_kernels.experiments.shared.report import write_json

NAME = "shapley_truth.json"
#: Rows that rivals know the distribution by, and draw from.
_KNOWN = 100_000
#: Rows explained at once by ours, as a data set would be.
_AT_ONCE = 4096

#: From rows ``(n, d)`` to their Shapley values.
Explain = Callable[[Tensor], Tensor]


def run(
    features: Sequence[int],
    seconds: Sequence[float],
    rows: int,
    budgets: Sequence[int],
    out: Path,
    console: Console,
) -> dict[str, Any]:
    """Measure all explainers on each number of features.

    Writes ``shapley_truth.json`` after each of them.

    Args:
        features: Groups of one feature each.
        seconds: Of training, for each of them.
        rows: How many rows rivals explain; ours explain these for the error, and more at once
            for the time.
        budgets: How many samples a rival draws, from few to many.
        out: Folder of the result.
        console: Where the table goes.
    """
    document: dict[str, Any] = {
        "machine": machine("cpu"),
        "versions": {name: _version(name) for name in ("shap", "shapiq")},
        "tasks": [],
    }
    for count, limit in zip(features, seconds, strict=True):
        task = GaussianTask(count)
        x, _ = task.draw(rows, torch.Generator().manual_seed(9))
        true = task.shapley(x)
        print_line(console, f"{count} features: {limit:g} s of training, then the rivals")
        found = [_ours(task, limit, x, true)]
        document["tasks"].append({"features": count, "explainers": found})
        write_json(out / NAME, document)
        for name, explain in _rivals(task, budgets):
            explain(x[:1])  # compiles
            start = time.perf_counter()
            phi = explain(x)
            spent = time.perf_counter() - start
            cost = {"rows": rows, "seconds": spent / rows}
            found.append({"name": name, **cost, **errors(phi, true)})
            write_json(out / NAME, document)
        _print(count, found, console)
    print_line(console, f"results: {out / NAME}")
    return document


def _ours(task: GaussianTask, limit: float, x: Tensor, true: Tensor) -> dict[str, Any]:
    trained = train(task, limit)
    many, _ = task.draw(_AT_ONCE, torch.Generator().manual_seed(10))
    trained.shapley(many)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        trained.shapley(many)
        times.append((time.perf_counter() - start) / len(many))
    start = time.perf_counter()
    for row in x[:8]:
        trained.shapley(row[None])
    alone = (time.perf_counter() - start) / 8
    return {
        "name": f"ours, {limit:g} s of training",
        "rows": len(x),
        "seconds": sorted(times)[len(times) // 2],
        "seconds_alone": alone,
        "training": {"seconds": trained.seconds, "steps": trained.steps},
        "experts": task.family.num_experts,
        **errors(trained.shapley(x), true),
    }


def _rivals(task: GaussianTask, budgets: Sequence[int]) -> Iterator[tuple[str, Explain]]:
    known = task.draw(_KNOWN, torch.Generator().manual_seed(11))[0].double().numpy()

    def model(rows: Any) -> Any:
        return task.mean(torch.as_tensor(rows, dtype=torch.float64)).numpy()

    for budget in budgets:
        if importlib.util.find_spec("shap"):
            yield f"shap Permutation, {budget}", _of_shap("Permutation", model, known[:budget])
            yield f"shap Kernel, {budget}", _of_shap("Kernel", model, known[:budget])
        if importlib.util.find_spec("shapiq"):
            for imputer in ("Marginal", "Gaussian", "GaussianCopula"):
                explain = _of_shapiq(imputer, model, known, budget)
                yield f"shapiq {imputer}, {budget}", explain


def _of_shap(kind: str, model: Any, background: Any) -> Explain:
    import shap

    if kind == "Kernel":
        explainer = shap.KernelExplainer(model, background)
        return lambda x: torch.as_tensor(explainer.shap_values(x.double().numpy(), silent=True))
    of_permutations = shap.PermutationExplainer(
        model, shap.maskers.Independent(background, max_samples=len(background))
    )
    return lambda x: torch.as_tensor(of_permutations(x.double().numpy(), silent=True).values)


def _of_shapiq(kind: str, model: Any, known: Any, budget: int) -> Explain:
    """Exact from the values of all coalitions; random is what the imputer draws for them."""
    import shapiq

    imputer = getattr(shapiq, f"{kind}Imputer")(model, known, sample_size=budget, random_state=0)

    def explain(x: Tensor) -> Tensor:
        values, players = [], x.shape[1]
        for row in x.double().numpy():
            game = imputer.fit(row)
            found = shapiq.ExactComputer(game, players)("SV")
            values.append([found[(n,)] for n in range(players)])
        return torch.tensor(values, dtype=torch.float64)

    return explain


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _print(features: int, found: Sequence[dict[str, Any]], console: Console) -> None:
    columns = [
        Column("explainer", text=True),
        Column("s / row"),
        Column("RMSE"),
        Column("of scale"),
    ]
    rows = [
        [one["name"], f"{one['seconds']:.2g}", f"{one['rmse']:.3f}", f"{one['relative']:.1%}"]
        for one in found
    ]
    print_table(
        console,
        f"Shapley values of {features} correlated Gaussians, against the closed form",
        columns,
        rows,
        "Rivals explain the true function, ours one learned from samples. The number after a "
        "rival's name: samples that it draws for a coalition, or rows of its background. shap and "
        "Marginal draw features apart from each other, which is another game.",
    )
