"""``python -m bench.networks.training``: samples a second of training a model, beside its rivals.

This is the MovieLens one; :mod:`bench.networks.skip_training` trains on sessions. Three models
on random ids and labels of MovieLens-1M's sizes, each trained as the experiment trains it:
features gathered by id, GEM loss (the black box: cross-entropy), backward, fused Adam. Rounds are
interleaved in one process; eager and under ``torch.compile`` (model and loss).
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench import results
from bench.layers.ratios import quartiles
from bench.rivals.paper_network import PaperStyleNCF
from maskmoe_kernels import gem_loss
from maskmoe_kernels.experiments.movielens.evaluate import CONFIDENCE
from maskmoe_kernels.experiments.shared.report import write_json
from maskmoe_kernels.models import NCF, InterpretableNCF, NCFSizes

NAME = "training.json"
OURS, BLACK_BOX, PAPER = "ours", "black box", "paper style"
NOTES = {
    OURS: "InterpretableNCF, packed layers",
    BLACK_BOX: "NCF of torch's own layers: another model, with one logit",
    PAPER: "the same model and weights as ours, one nn.Linear an expert over detached sources",
}
#: Of the GEM loss, as the experiment takes it.
OPTIONS: dict[str, Any] = {
    "confidence": CONFIDENCE,
    "weighting": "deselection",
    "normalize": "expert",
}
MOVIELENS = NCFSizes(num_users=6040, num_items=3706)


@dataclass(frozen=True)
class Plan:
    """What to train and for how long.

    Attributes:
        batches: Samples a step; ``None``: those of the subject.
        rounds: Interleaved rounds.
        compile: Whether to measure ``torch.compile`` too.
        seconds: Least seconds of a sample of the clock.
        sizes: Of the tables.
    """

    batches: Sequence[int] | None = None
    rounds: int = 15
    compile: bool = True
    seconds: float = 0.3
    sizes: NCFSizes = MOVIELENS


Make = Callable[[str, bool], "Trainer"]


@dataclass(frozen=True)
class Subject:
    """What is trained.

    Attributes:
        title: Of the table.
        file: Where the results go.
        notes: Model to what it is; ours first, then its rivals.
        batches: Samples a step.
        prepare: Batch size, plan and device to what makes a trainer by name, compiled or not.
        compiled: Who is measured under ``torch.compile`` too; ``None``: everybody.
    """

    title: str
    file: str
    notes: Mapping[str, str]
    batches: Sequence[int]
    prepare: Callable[[int, Plan, str], Make]
    compiled: Collection[str] | None = None


SMOKE = Plan((64,), rounds=3, compile=False, seconds=0.02, sizes=NCFSizes(50, 40))


class Data:
    """Random samples of the tables' sizes, and the features of every user and item."""

    def __init__(self, sizes: NCFSizes, batch: int, device: str, steps: int = 16) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=generator).to(device)

        counts = [count for count, _ in sizes.categories.values()]
        self.codes = torch.stack([draw(count, sizes.num_users) for count in counts], 1)
        self.numeric = torch.randn(sizes.num_items, sizes.num_numeric, generator=generator)
        self.numeric = self.numeric.to(device)
        self.batch = batch
        self.users, self.items = (
            draw(count, steps * batch) for count in (sizes.num_users, sizes.num_items)
        )
        self.target = draw(2, steps * batch).float()

    def step(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Users, items and labels of step ``k``, over and over."""
        start = k * self.batch % len(self.users)
        span = slice(start, start + self.batch)
        return self.users[span], self.items[span], self.target[span]


class Trainer:
    """One model in training.

    Args:
        name: One of ``NOTES``.
        data: What it is trained on.
        sizes: Of its tables.
        device: Where.
        compiled: Whether model and loss go through ``torch.compile``.
    """

    def __init__(
        self, name: str, data: Data, sizes: NCFSizes, device: str, compiled: bool = False
    ) -> None:
        model = build(name, sizes).to(device)
        self.start(name, data, model, loss_of(model, data), device, compiled)

    def start(
        self,
        name: str,
        data: Any,
        model: nn.Module,
        loss: Callable[..., Tensor],
        device: str,
        compiled: bool,
        clip: float | None = None,
    ) -> None:
        """Set up optimiser and counters; ``data`` has ``batch`` and ``step(k)``."""
        self.name, self.data, self.compiled, self.clip = name, data, compiled, clip
        self.model = model
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, fused=True)
        self.loss: Callable[..., Tensor] = torch.compile(loss, dynamic=False) if compiled else loss
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.done = 0
        self.steps = 1
        self.samples: list[float] = []

    def train(self, steps: int) -> None:
        """Steps as ``maskmoe_kernels.experiments.shared.trainer`` takes them."""
        for _ in range(steps):
            batch = self.data.step(self.done)
            self.optimizer.zero_grad()
            loss = self.loss(*batch)
            loss.backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.total.add_(loss.detach(), alpha=len(batch[0]))
            self.done += 1

    def warm_up(self, seconds: float) -> None:
        """Compile, fill caches, and find how many steps take ``seconds``."""
        self.train(3)
        self.steps = 2
        self.steps = max(1, round(seconds * self.sample() / self.data.batch + 0.5))

    def sample(self) -> float:
        """Samples a second over ``steps`` steps."""
        on_gpu = self.total.is_cuda
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        self.train(self.steps)
        if on_gpu:
            torch.cuda.synchronize()
        return self.steps * self.data.batch / (time.perf_counter() - start)


def build(name: str, sizes: NCFSizes, backend: str | None = None) -> nn.Module:
    """One of ``NOTES``, from the same seed; ours on ``backend``."""
    torch.manual_seed(0)
    if name == BLACK_BOX:
        return NCF(sizes)
    ours = InterpretableNCF(sizes, backend=backend)
    return ours if name == OURS else PaperStyleNCF(ours)


def loss_of(model: nn.Module, data: Data) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Loss of users, items and labels, features gathered by id, as the experiment computes it."""
    family = getattr(model, "family", None)

    def loss(users: Tensor, items: Tensor, target: Tensor) -> Tensor:
        inputs = (users, items, data.codes[users], data.numeric[items])
        if isinstance(model, InterpretableNCF):
            return model.gem_loss(*inputs, target, **OPTIONS)
        logits = model(*inputs)
        if family is None:
            return F.binary_cross_entropy_with_logits(logits[:, 0].float(), target)
        return gem_loss(logits, target, family, **OPTIONS)

    return loss


def _prepare(batch: int, plan: Plan, device: str) -> Make:
    data = Data(plan.sizes, batch, device)
    return lambda name, compiled: Trainer(name, data, plan.sizes, device, compiled)


SUBJECT = Subject("Training the MovieLens model", NAME, NOTES, (256, 4096), _prepare)


def measure(
    batch: int, plan: Plan, device: str, subject: Subject = SUBJECT
) -> list[dict[str, Any]]:
    """Samples a second of every model at one batch size."""
    make = subject.prepare(batch, plan, device)
    records, trainers = [], []
    for compiled in (False, True) if plan.compile else (False,):
        for name, note in subject.notes.items():
            if compiled and subject.compiled is not None and name not in subject.compiled:
                continue
            record: dict[str, Any] = {"model": name, "compiled": compiled, "batch": batch}
            records.append(record | {"note": note})
            try:
                trainer = make(name, compiled)
                trainer.warm_up(plan.seconds)
                trainers.append((records[-1], trainer))
            except Exception as error:  # what cannot run is reported, not dropped
                records[-1]["unavailable"] = (
                    f"{type(error).__name__}: {' '.join(str(error).split())}"
                )
    order = random.Random(batch)
    for _ in range(plan.rounds):
        for _, trainer in order.sample(trainers, len(trainers)):
            trainer.samples.append(trainer.sample())
    for record, trainer in trainers:
        low, median, high = quartiles(trainer.samples)
        record |= {"samples_per_s": median, "q25": low, "q75": high}
        record |= {"parameters": sum(p.numel() for p in trainer.model.parameters())}
        record |= {"rounds": len(trainer.samples), "steps_a_sample": trainer.steps}
    return records


def ratios(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours / the others, for each batch, eager and compiled."""
    rates = {
        (r["batch"], r["compiled"], r["model"]): r["samples_per_s"]
        for r in records
        if "samples_per_s" in r
    }
    return [
        {
            "batch": batch,
            "compiled": compiled,
            "to": other,
            "ratio": rate / rates[batch, compiled, other],
        }
        for (batch, compiled, name), rate in rates.items()
        for other in dict.fromkeys(r["model"] for r in records)
        if name == OURS != other and (batch, compiled, other) in rates
    ]


def run(
    plan: Plan, out: Path, device: str, console: Console, subject: Subject = SUBJECT
) -> dict[str, Any]:
    """Measure every batch size, print, write the subject's file into ``out`` after each."""
    document: dict[str, Any] = {"machine": results.machine(device), "results": [], "ratios": []}
    for batch in plan.batches or subject.batches:
        what = "eager and compiled, which takes minutes" if plan.compile else "eager"
        console.print(f"batch {batch}: {what}", highlight=False)
        document["results"] += measure(batch, plan, device, subject)
        document["ratios"] = ratios(document["results"])
        write_json(out / subject.file, document)
    show(document, subject.title, console)
    console.print(str(out / subject.file), markup=False, highlight=False, soft_wrap=True)
    return document


def show(document: dict[str, Any], title: str, console: Console) -> None:
    """Results and ratios as a table."""
    table = Table(title=title)
    for column in ("batch", "how", "model", "samples/s", "quartiles", "ours is"):
        table.add_column(column, justify="left" if column in ("how", "model") else "right")
    ratio = {(r["batch"], r["compiled"], r["to"]): r["ratio"] for r in document["ratios"]}
    for r in document["results"]:
        how = "compiled" if r["compiled"] else "eager"
        if "unavailable" in r:
            reason = r["unavailable"][:120].replace("[", r"\[")
            table.add_row(str(r["batch"]), how, r["model"], "-", reason, "")
            continue
        than = ratio.get((r["batch"], r["compiled"], r["model"]))
        table.add_row(
            str(r["batch"]),
            how,
            r["model"],
            f"{r['samples_per_s']:,.0f}",
            f"{r['q25']:,.0f}-{r['q75']:,.0f}",
            "" if than is None else f"{than:.2f}x as fast",
        )
    console.print(table)


if __name__ == "__main__":
    from bench.command import entry  # which imports this module

    sys.exit(entry(["train", *sys.argv[1:]]))
