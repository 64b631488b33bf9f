"""Evaluation of the toy experiment: accuracy, right attributions, and their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from maskmoe_kernels.experiments.shared.output import Column, print_table
from maskmoe_kernels.experiments.toy.data import ToyTask, held_out, toy_task
from maskmoe_kernels.explain import sufficient
from maskmoe_kernels.layout.subsets import SubsetFamily
from maskmoe_kernels.models import InterpretableMLP
from maskmoe_kernels.ops.selection import mixture
from maskmoe_kernels.ops.selection.api import Mixture

CONFIDENCES = ("abs", "square", "smooth")
#: Not a confidence: the smallest expert that suffices explains, and the one that sees all predicts.
SUFFICIENT = "sufficient"
#: Log-odds within which an expert suffices, and beyond which all answers count as the same (0.95).
TOLERANCE, SURE = 1.5, 3.0


def explained(logits: Tensor, family: SubsetFamily, rule: str) -> Mixture:
    """Prediction and attribution by the paper's mixture, or by the smallest expert that suffices.

    Labels of these tasks are hardly ever in doubt, and log-odds have no end: where two experts are
    both sure, what is left between them explains nothing. So ``SURE`` is where they end here.

    Args:
        logits: ``(n, H)``.
        family: Its experts.
        rule: A confidence, or ``SUFFICIENT``: who suffices is then selected alone.

    Raises:
        LayoutError: No expert sees all, and ``rule`` is ``SUFFICIENT``.
    """
    if rule != SUFFICIENT:
        return mixture(logits, family, rule)
    found = sufficient(logits.clamp(-SURE / 2, SURE / 2), family, TOLERANCE)
    chosen = torch.nn.functional.one_hot(found.expert, family.num_experts).to(logits.dtype)
    return Mixture(sufficient(logits, family).prediction, chosen, chosen)


@torch.no_grad()
def evaluate(
    net: InterpretableMLP,
    task: str | ToyTask,
    seed: int = 0,
    n: int = 20_000,
    rules: Sequence[str] = CONFIDENCES,
) -> dict[str, dict[str, Any]]:
    """Accuracy and right attributions on ``n`` fresh samples.

    Args:
        net: Trained.
        task: Which one.
        seed: That of the training.
        n: How many samples.
        rules: Confidences, or ``SUFFICIENT``; see :func:`explained`.

    Returns:
        For each of them ``accuracy``, ``right_expert`` (kind of cluster to the share of its samples
        whose largest attribution is their cluster's own expert) and ``clusters`` (the same numbers
        for each cluster).
    """
    task = toy_task(task)
    x, y, which = held_out(task, n, seed)
    logits = net(x.to(next(net.parameters()).device)).cpu()
    own = torch.tensor([task.family.names.index(c.expert) for c in task.clusters])[which]
    kind = torch.tensor([task.kinds.index(c.kind) for c in task.clusters])[which]
    table = {}
    for rule in rules:
        mixed = explained(logits, task.family, rule)
        correct = (mixed.probability > 0.5) == (y > 0.5)
        right = mixed.attribution.argmax(-1) == own
        table[rule] = {
            "accuracy": _share(correct),
            "right_expert": {name: _share(right[kind == k]) for k, name in enumerate(task.kinds)},
            "clusters": [
                {
                    "center": list(cluster.center),
                    "label": cluster.label,
                    "expert": cluster.expert,
                    "accuracy": _share(correct[which == k]),
                    "right_expert": _share(right[which == k]),
                }
                for k, cluster in enumerate(task.clusters)
            ],
        }
    return table


def _share(hits: Tensor) -> float | None:
    return round(float(hits.double().mean()), 6) if len(hits) else None


def combine(reports: Sequence[Mapping[str, Any]], command: str | None = None) -> dict[str, Any]:
    """One report of several seeds: each seed's numbers, and the worst and mean of them."""
    first = reports[0]
    shared = ("experiment", "task", "title", "device", "machine", "config", "parameters")
    own = ("seed", "seconds", "samples_per_s", "losses", "table")
    tables = [_numbers(report["table"]) for report in reports]
    summary = {
        confidence: {
            name: {
                "worst": min(table[confidence][name] for table in tables),
                "mean": round(sum(table[confidence][name] for table in tables) / len(tables), 6),
            }
            for name in tables[0][confidence]
        }
        for confidence in tables[0]
    }
    return {
        **{key: first[key] for key in shared},
        "command": command,
        "summary": summary,
        "seeds": [{key: report[key] for key in own} for report in reports],
    }


def _numbers(table: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Accuracy and right attributions of each confidence, flat."""
    return {
        confidence: {"accuracy": row["accuracy"], **row["right_expert"]}
        for confidence, row in table.items()
    }


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Table of a report of one run, or of several seeds (:func:`combine`)."""
    runs = report.get("seeds", [report])
    kinds = list(next(iter(runs[0]["table"].values()))["right_expert"])
    samples = report["config"]["test_samples"]
    columns = [Column("explained by", text=True), Column("seed", optional=1), Column("accuracy")]
    columns += [Column(f"right expert, {kind}") for kind in kinds]
    rows = []
    for confidence in runs[0]["table"]:
        for entry in runs:
            row = _numbers(entry["table"])[confidence]
            cells = ["-" if value is None else f"{value:.4f}" for value in row.values()]
            rows.append([confidence, str(entry["seed"]), *cells])
    print_table(
        console,
        f"Toy ({report['task']}): {report['title']}",
        columns,
        rows,
        f"{samples:,} fresh samples; right expert: the largest attribution is that of the "
        "smallest subset that separates the sample's cluster",
    )
