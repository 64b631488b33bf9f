"""What explanations cost: beside the forward pass that made the logits, and in training.

Experts of all subsets of some groups. ``python -m bench explain``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from bench.clock import own_clock
from bench.machine import machine
from bench.networks import mlp_training, training
from bench.networks.training import OURS, PAPER, Schedule, Subject, Trainer
from bench.rivals.paper_style_mlp import PaperStyleMLP
from bench.statistics import quartiles
from maskmoe_kernels import (
    InterpretableMLP,
    SubsetFamily,
    gem_loss,
    interactions,
    moebius,
    shapley,
    sufficient,
)
from maskmoe_kernels.experiments.shared.output import Column, print_line, print_table
from maskmoe_kernels.experiments.shared.report import write_json

FILE = "explanation_cost.json"
SELECTION = "ours, selection"
NOTES = {
    OURS: "every expert learns from every sample, in one pass",
    SELECTION: "the paper's weights, in one pass",
    PAPER: "every expert learns from every sample; one nn.Linear an expert over detached sources",
}
#: Width of a group of features.
_GROUP = 16


def family_of(groups: int) -> SubsetFamily:
    """All subsets but the empty one."""
    return SubsetFamily.powerset({f"x{n}": _GROUP for n in range(groups)})


def run(
    groups: int, width: int, rows: int, schedule: Schedule, out: Path, console: Console
) -> dict[str, Any]:
    """Measure both costs; print them and write ``explanation_cost.json``.

    Args:
        groups: The experts are all subsets of so many groups of 16 features.
        width: Units an expert of both hidden layers.
        rows: Whose logits are explained.
        schedule: Batch sizes and rounds of training; the explanations take as many rounds.
        out: Folder of the result.
        console: Where the tables go.
    """
    family = family_of(groups)
    document: dict[str, Any] = {
        "machine": machine("cpu"),
        "family": {"groups": groups, "experts": family.num_experts, "width": width, "rows": rows},
        "explaining": _explaining(family, width, rows, schedule.rounds),
    }
    write_json(out / FILE, document)
    _print(document, console)
    of = Subject("", FILE, NOTES, (256, 1024), functools.partial(_prepare, family, width))
    results = []
    for batch in schedule.batches or of.batches:
        results += training.measure(of, batch, schedule, "cpu")
        document["training"] = {"results": results, "ratios": training.ratios(results)}
        write_json(out / FILE, document)
    title = f"Training {family.num_experts} experts of {width} units"
    training.show(document["training"], title, console)
    print_line(console, f"results: {out / FILE}")
    return document


@torch.no_grad()
def _explaining(family: SubsetFamily, width: int, rows: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds of the forward pass and of each explanation of its logits, in turns."""
    torch.manual_seed(0)
    net = InterpretableMLP(family, [width, width])
    x = torch.randn(rows, family.in_features)
    logits = net(x)
    steps: dict[str, Callable[[], Any]] = {
        "forward": lambda: net(x),
        "shapley": lambda: shapley(logits, family, 0.0),
        "interactions": lambda: interactions(logits, family, 0.0),
        "moebius": lambda: moebius(logits, family, 0.0),
        "sufficient": lambda: sufficient(logits, family),
    }
    clock = own_clock()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = clock()
            step()
            times[name].append(clock() - start)
    found = []
    for name, taken in times.items():
        low, median, high = quartiles(taken)
        share = quartiles([a / b for a, b in zip(taken, times["forward"], strict=True)])[1]
        found.append(
            {"what": name, "seconds": median, "q25": low, "q75": high, "of_forward": share}
        )
    return found


def _prepare(
    family: SubsetFamily, width: int, batch: int, schedule: Schedule, device: str
) -> training.Make:
    data = mlp_training.Data(family.in_features, batch, torch.float32, device)
    return lambda name, compiled: trainer(name, family, width, data, compiled)


def trainer(
    name: str, family: SubsetFamily, width: int, data: mlp_training.Data, compiled: bool = False
) -> Trainer:
    """A trainer of one of ``NOTES``; all begin with the same weights."""
    torch.manual_seed(0)
    net = InterpretableMLP(family, [width, width])
    if name == PAPER:
        rival = PaperStyleMLP(net)

        def loss(x: Tensor, target: Tensor) -> Tensor:
            return gem_loss(rival(x), target, family, weighting="uniform")

        return Trainer(data, rival, loss, compiled)
    weighting = "uniform" if name == OURS else "selection"
    return Trainer(
        data, net, lambda x, target: net.gem_loss(x, target, weighting=weighting), compiled
    )


def _print(document: dict[str, Any], console: Console) -> None:
    columns = [
        Column("what", text=True),
        Column("seconds"),
        Column("quartiles", optional=1),
        Column("of the forward pass"),
    ]
    found: Sequence[dict[str, Any]] = document["explaining"]
    rows = [
        [
            one["what"],
            f"{one['seconds']:.3g}",
            f"{one['q25']:.3g}-{one['q75']:.3g}",
            f"{one['of_forward']:.2%}",
        ]
        for one in found
    ]
    of = document["family"]
    print_table(
        console,
        f"Explaining {of['rows']:,} rows by {of['experts']} experts of {of['width']} units",
        columns,
        rows,
        "forward: the pass that makes the logits. The others explain all rows at once.",
    )
