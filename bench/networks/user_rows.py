"""What a training step costs with few and with many users: sparse and dense gradients.

The interpretable GRU on random sessions of users that are drawn uniformly, an embedding of
each. ``python -m bench users``. Seconds are those of the process, so that other work on the
machine does not count.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.machine import machine
from bench.statistics import quartiles
from maskmoe_kernels.experiments.shared.output import Column, print_line, print_table
from maskmoe_kernels.experiments.shared.report import write_json
from maskmoe_kernels.experiments.shared.trainer import take_step
from maskmoe_kernels.layout.families import skip_sessions
from maskmoe_kernels.layout.subsets import SubsetFamily
from maskmoe_kernels.models import InterpretableGRU, UserTable
from maskmoe_kernels.nn import RowAdam
from maskmoe_kernels.ops.selection import gem_loss

FILE = "user_rows.json"
SPARSE, DENSE = "sparse gradients", "dense gradients"
NOTES = {
    SPARSE: "nn.Embedding(sparse=True), RowAdam: the same results to rounding",
    DENSE: "nn.Embedding, torch.optim.Adam(fused=True)",
}
#: Units of the embedding, and steps of each half.
WIDTH, STEPS = 16, 10


class Case:
    """A model that is trained on random sessions.

    Args:
        name: One of ``NOTES``.
        users: Rows of the table.
        batch: Sessions a step.
        width: Units an expert.
    """

    def __init__(self, name: str, users: int, batch: int, width: int = 8) -> None:
        torch.manual_seed(0)
        family, second = skip_sessions()
        family = SubsetFamily(
            {**family.groups, "who": WIDTH},
            {**family.subsets, "who": ["who"], "everything": [*family.groups, "who"]},
        )
        second = {**second, "who": WIDTH}
        table = UserTable(users, "who", family.groups, second, sparse=name == SPARSE)
        self.model = InterpretableGRU(family, second, width, users=table)
        self.optimizer = RowAdam(self.model)
        self._random = torch.Generator().manual_seed(1)
        self._first = torch.randn(batch, STEPS, family.in_features, generator=self._random)
        self._second = torch.randn(batch, STEPS, sum(second.values()), generator=self._random)
        self._target = torch.randint(2, (batch, STEPS), generator=self._random).float()
        self._users = users

    def step(self) -> None:
        """One step of training, gradients clipped, as in the experiment."""
        user = torch.randint(self._users, (len(self._first),), generator=self._random)

        def loss() -> torch.Tensor:
            logits = self.model(self._first, self._second, user=user)
            return gem_loss(logits, self._target, self.model.family)

        take_step(self.optimizer, loss, 1.0)


def run(
    users: Sequence[int], batch: int, rounds: int, warm: int, out: Path, console: Console
) -> dict[str, Any]:
    """Measure steps in turns, and the end of an epoch; print them and write ``user_rows.json``.

    Args:
        users: Sizes of the table.
        batch: Sessions a step.
        rounds: Steps of each case that are measured.
        warm: Steps of each case before them: rows then have many steps to catch up.
        out: Folder of the result.
        console: Where the table goes.
    """
    cases = {(name, count): Case(name, count, batch) for count in users for name in NOTES}
    for case in cases.values():
        for _ in range(warm):
            case.step()
    times: dict[tuple[str, int], list[float]] = {key: [] for key in cases}
    for _ in range(rounds):
        for key, case in cases.items():
            start = time.process_time()
            case.step()
            times[key].append(time.process_time() - start)
    results = []
    for key, case in cases.items():
        start = time.process_time()
        case.optimizer.settle()
        settled = time.process_time() - start
        low, median, high = quartiles(times[key])
        found = {"gradients": key[0], "users": key[1], "seconds": median, "q25": low, "q75": high}
        results.append({**found, "settle_seconds": settled})
    document = {
        "machine": machine("cpu"),
        "clock": "seconds of the process",
        "what": f"InterpretableGRU, 10 experts x 8, embedding of {WIDTH}, {batch} sessions a step "
        f"of {STEPS} + {STEPS} tracks, of uniform users; {warm} steps before",
        "notes": NOTES,
        "results": results,
    }
    write_json(out / FILE, document)
    columns = [Column("gradients", text=True), Column("users"), Column("ms a step"),
               Column("quartiles", optional=1), Column("ms to settle")]  # fmt: skip
    rows = [
        [
            one["gradients"],
            f"{one['users']:,}",
            f"{1e3 * one['seconds']:.1f}",
            f"{1e3 * one['q25']:.1f}-{1e3 * one['q75']:.1f}",
            f"{1e3 * one['settle_seconds']:.0f}",
        ]
        for one in results
    ]
    note = "settle: once an epoch, all rows do the steps that they missed. Process time."
    print_table(console, f"Training {batch} sessions of users a step", columns, rows, note)
    print_line(console, f"results: {out / FILE}")
    return document
