"""Samples a second of training a model, beside its rivals: ``python -m bench train``.

Each model is a :class:`Trainer`; a :class:`Subject` says which models are trained on what. Rounds
are interleaved in one process, eager, under ``torch.compile`` (model and loss) and, on a GPU, with
the whole step captured once as a CUDA graph and replayed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor, nn

from bench.clock import own_clock
from bench.device import capture
from bench.machine import machine
from bench.statistics import quartiles
from maskmoe_kernels.experiments.shared.output import Column, print_line, print_table
from maskmoe_kernels.experiments.shared.report import write_json
from maskmoe_kernels.models import NCFSizes

MOVIELENS_1M = NCFSizes(num_users=6040, num_items=3706)
#: Names of models.
OURS, BLACK_BOX, PAPER = "ours", "black box", "paper style"
Make = Callable[[str, bool], "Trainer"]


@dataclass(frozen=True)
class Schedule:
    """How long to train, and at which sizes.

    Attributes:
        batches: Samples a step; ``None``: those of the subject.
        rounds: Interleaved rounds.
        compile: Whether to measure ``torch.compile`` too.
        seconds: Minimum duration of a timed sample.
        sizes: Of the embedding tables.
    """

    batches: Sequence[int] | None = None
    rounds: int = 15
    compile: bool = True
    seconds: float = 0.3
    sizes: NCFSizes = MOVIELENS_1M


@dataclass(frozen=True)
class Subject:
    """What is trained.

    Attributes:
        title: Of the table.
        file: Name of the json file.
        notes: Name of a model to what it is; ours first, then its rivals.
        batches: Samples a step.
        prepare: Takes batch size, schedule and device; returns a function that makes a trainer
            from the name of a model and whether it is compiled.
        compiled: Models that are measured under ``torch.compile`` too; ``None``: all.
    """

    title: str
    file: str
    notes: Mapping[str, str]
    batches: Sequence[int]
    prepare: Callable[[int, Schedule, str], Make]
    compiled: Collection[str] | None = None


class Data(Protocol):
    """Batches that repeat."""

    batch: int

    def step(self, k: int) -> tuple[Tensor, ...]:
        """The tensors of step ``k``."""


class Trainer:
    """One model in training.

    Args:
        data: What it is trained on.
        model: On the device of the data.
        loss: Of a batch of the data.
        compiled: Whether model and loss go through ``torch.compile``.
        clip: Largest norm of the gradient.
    """

    def __init__(
        self,
        data: Data,
        model: nn.Module,
        loss: Callable[..., Tensor],
        compiled: bool = False,
        clip: float | None = None,
    ) -> None:
        self.data, self.model, self.clip = data, model, clip
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, fused=True)
        self.loss: Callable[..., Tensor] = torch.compile(loss, dynamic=False) if compiled else loss
        device = next(model.parameters()).device
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.take: Callable[..., None] = self._take  # a step on a batch
        self.done = 0
        self.steps = 1
        self.samples: list[float] = []

    def train(self, steps: int) -> None:
        """Take steps as ``maskmoe_kernels.experiments.shared.trainer`` does."""
        for _ in range(steps):
            self.take(*self.data.step(self.done))
            self.done += 1

    def _take(self, *batch: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = self.loss(*batch)
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.total.add_(loss.detach(), alpha=len(batch[0]))

    def capture(self) -> None:
        """Make all steps from now on replays of a CUDA graph; call it before the first step."""
        for group in self.optimizer.param_groups:
            group["capturable"] = True
        held = [tensor.clone() for tensor in self.data.step(0)]
        replay, _ = capture(lambda: self._take(*held), self.total.device)

        def take(*batch: Tensor) -> None:
            for tensor, values in zip(held, batch, strict=True):
                tensor.copy_(values)
            replay()

        self.take = take

    def warm_up(self, seconds: float) -> None:
        """Compile, fill caches, and choose the number of steps that takes ``seconds``."""
        self.train(3)
        self.steps = 2
        self.steps = max(1, round(seconds * self.sample() / self.data.batch + 0.5))

    def sample(self) -> float:
        """Samples a second over ``steps`` steps."""
        on_gpu = self.total.is_cuda
        clock = time.perf_counter if on_gpu else own_clock()
        if on_gpu:
            torch.cuda.synchronize()
        start = clock()
        self.train(self.steps)
        if on_gpu:
            torch.cuda.synchronize()
        return self.steps * self.data.batch / (clock() - start)


def measure(subject: Subject, batch: int, schedule: Schedule, device: str) -> list[dict[str, Any]]:
    """Samples a second of every model at one batch size."""
    make = subject.prepare(batch, schedule, device)
    records, trainers = [], []
    ways = ["eager", *["compiled"] * schedule.compile]
    ways += ["captured"] * (torch.device(device).type == "cuda")
    for way in ways:
        for name, note in subject.notes.items():
            compiled = way == "compiled"
            if compiled and subject.compiled is not None and name not in subject.compiled:
                continue
            records.append({"model": name, "way": way, "batch": batch, "note": note})
            try:
                trainer = make(name, compiled)
                if way == "captured":
                    trainer.capture()
                trainer.warm_up(schedule.seconds)
                trainers.append((records[-1], trainer))
            except Exception as error:  # a model that cannot run is recorded with its reason
                records[-1]["unavailable"] = (
                    f"{type(error).__name__}: {' '.join(str(error).split())}"
                )
    order = random.Random(batch)
    for _ in range(schedule.rounds):
        for _, trainer in order.sample(trainers, len(trainers)):
            trainer.samples.append(trainer.sample())
    for record, trainer in trainers:
        low, median, high = quartiles(trainer.samples)
        record |= {"samples_per_s": median, "q25": low, "q75": high}
        record |= {"parameters": sum(p.numel() for p in trainer.model.parameters())}
        record |= {"rounds": len(trainer.samples), "steps_a_sample": trainer.steps}
    return records


def ratios(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rate of ours / rate of each other model, for each batch and way to train."""
    rates = {
        (r["batch"], r["way"], r["model"]): r["samples_per_s"]
        for r in records
        if "samples_per_s" in r
    }
    return [
        {
            "batch": batch,
            "way": way,
            "to": other,
            "ratio": rate / rates[batch, way, other],
        }
        for (batch, way, name), rate in rates.items()
        for other in dict.fromkeys(r["model"] for r in records)
        if name == OURS != other and (batch, way, other) in rates
    ]


def run(
    subject: Subject, schedule: Schedule, out: Path, device: str, console: Console
) -> dict[str, Any]:
    """Measure every batch size and print; write the subject's file into ``out`` after each."""
    document: dict[str, Any] = {"machine": machine(device), "results": [], "ratios": []}
    for batch in schedule.batches or subject.batches:
        what = "eager and compiled, which takes minutes" if schedule.compile else "eager"
        print_line(console, f"batch {batch}: {what}")
        document["results"] += measure(subject, batch, schedule, device)
        document["ratios"] = ratios(document["results"])
        write_json(out / subject.file, document)
    show(document, subject.title, console)
    print_line(console, f"results: {out / subject.file}")
    return document


def show(document: dict[str, Any], title: str, console: Console) -> None:
    """Print results and ratios as a table."""
    columns = [
        Column("batch"),
        Column("how", text=True),
        Column("model", text=True),
        Column("samples/s"),
        Column("quartiles", optional=1),
        Column("ours is"),
    ]
    ratio = {(r["batch"], r["way"], r["to"]): r["ratio"] for r in document["ratios"]}
    rows, reasons = [], {}
    for r in document["results"]:
        cells = [str(r["batch"]), r["way"], r["model"]]
        if "unavailable" in r:
            rows.append([*cells, "-", "-", "-"])
            reasons[f"{r['model']}, {r['way']}, batch {r['batch']}"] = r["unavailable"]
            continue
        than = ratio.get((r["batch"], r["way"], r["model"]))
        times = "-" if than is None else f"{than:.2f}x as fast"
        quartiles = f"{r['q25']:,.0f}-{r['q75']:,.0f}"
        rows.append([*cells, f"{r['samples_per_s']:,.0f}", quartiles, times])
    print_table(console, title, columns, rows)
    for what, reason in reasons.items():
        print_line(console, f"{what}: not measured: {reason}", "yellow")
