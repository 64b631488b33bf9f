"""Evaluates skip models: metrics beside the paper's tables 2 and 3, and which experts decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.output import (
    Column,
    print_line,
    print_table,
    print_written,
)
from maskmoe_kernels.experiments.shared.progress import counted
from maskmoe_kernels.experiments.shared.report import machine, write_json
from maskmoe_kernels.experiments.shared.trainer import Run
from maskmoe_kernels.experiments.skip import figures as skip_figures
from maskmoe_kernels.experiments.skip.baselines import last_skip, mean_skip, random_skip
from maskmoe_kernels.experiments.skip.data.columns import MSSD
from maskmoe_kernels.experiments.skip.data.features import SessionBatch
from maskmoe_kernels.experiments.skip.data.sessions import SessionDataset
from maskmoe_kernels.experiments.skip.data.shards import Shards
from maskmoe_kernels.experiments.skip.deciders import Deciders
from maskmoe_kernels.experiments.skip.generator.causes import Causes
from maskmoe_kernels.experiments.skip.metrics import SkipTally
from maskmoe_kernels.experiments.skip.models import decided, logits_of, probability
from maskmoe_kernels.experiments.skip.runs import check_schema, load
from maskmoe_kernels.experiments.skip.schema.schema import Schema
from maskmoe_kernels.experiments.skip.settings import TOLERANCE, Settings
from maskmoe_kernels.files import claim
from maskmoe_kernels.models.sessions import SessionExperts, SessionModel

#: Tables 2 and 3 of the paper, by schema: the values of ``METRICS``, per cent.
PAPER = {
    MSSD.name: {
        "last": (63.0, 74.2, 54.3),
        "mean": (61.7, 66.3, 51.7),
        "black-box-transformer": (72.2, 80.0, 62.8),
        "interpretable-transformer": (70.9, 78.8, 61.1),
    },
    "users": {
        "random": (50.0, 50.0, 32.3),
        "last": (69.0, 77.9, 60.8),
        "mean": (70.1, 73.3, 60.9),
        "black-box-transformer": (78.9, 83.4, 70.2),
        "interpretable-transformer": (77.7, 82.4, 68.8),
    },
}
TABLES = {MSSD.name: 2, "users": 3}
METRICS = ("Acc", "Acc@1", "MAA")
#: Skips and padding of half A to a prediction for each track of half B.
BASELINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"last": last_skip, "mean": mean_skip}
#: Sessions of a batch.
BATCH = 512


def evaluate(
    data: Path,
    out: Path,
    runs: Sequence[Path],
    *,
    causes: Path | None = None,
    split: str = "test",
    sharpness: float | None = None,
    device: str = "cpu",
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate the baselines and trained models; write ``evaluation.json`` and figures.

    Args:
        data: The folder of shards.
        out: The folder of the results; made if missing.
        runs: Folders of ``maskmoe skip train``.
        causes: Folder of ``maskmoe skip generate``, if the sessions are generated.
        split: The split whose sessions are used.
        sharpness: Sharpness of the prediction; ``None``: the one that each model was trained with.
        device: Where to compute.
        console: Where progress and tables are shown; ``None`` is quiet.

    Returns:
        The content of ``evaluation.json``.

    Raises:
        DataError: Shards, a run or the causes are missing, damaged, or do not belong together.
    """
    claim(out)
    trained = _named([(load(path, device), path) for path in runs])
    sessions = SessionDataset(Shards(data, split), BATCH)
    schema = sessions.shards.schema
    for (model, *_), path in zip(trained.values(), runs, strict=True):
        check_schema(path, model, schema)
    known = None if causes is None else Causes(causes, schema)
    entries: dict[str, _Baseline | _Trained] = {**_baselines(schema)}
    for name, (model, settings, run) in trained.items():
        entries[name] = _Trained(model, settings, run, sharpness, schema)
    if console is not None:
        print_line(console, f"evaluating {len(sessions.shards):,} sessions, into {out}")
    for batch in counted(console, "evaluating", sessions, sessions.schedule().batches, "batches"):
        label_causes = None if known is None else known.of_batch(batch)
        moved = batch.to(device)
        for entry in entries.values():
            entry.add(moved, label_causes)
    report: dict[str, Any] = {
        "schema": schema.name,
        "data": sessions.shards.digest,
        "split": split,
        "sessions": len(sessions.shards),
        "machine": machine(),
        "models": {name: entry.report() for name, entry in entries.items()},
    }
    write_json(out / "evaluation.json", report)
    missing = skip_figures.draw(report, out)
    if console is not None:
        print_report(report, console)
        print_written(console, "report", "figures", out, missing)
    return report


class _Baseline:
    """A baseline and its counts.

    Args:
        name: Its name.
        schema: The schema of the sessions.
        predict: Labels and padding of half A to a prediction for each track of half B.
    """

    def __init__(
        self, name: str, schema: Schema, predict: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self.schema = schema
        self.name, self.predict, self.tally = name, predict, SkipTally()

    def add(self, batch: SessionBatch, causes: tuple[Tensor, Tensor] | None) -> None:
        """Count a batch; ``causes`` is not used."""
        predicted = (
            self.predict(batch.first[..., self.schema.label_column], batch.first_padding) > 0.5
        )
        self.tally.add(predicted == (batch.target > 0.5), ~batch.second_padding)

    def report(self) -> dict[str, Any]:
        """Its entry in ``evaluation.json``."""
        return {**self.tally.metrics(), "paper": _paper(self.name, self.schema)}


def _baselines(schema: Schema) -> dict[str, _Baseline]:
    """The baselines by name; ``random`` where the paper has it."""
    predictions = dict(BASELINES)
    if "random" in PAPER.get(schema.name, {}):
        generator = torch.Generator().manual_seed(0)
        predictions = {"random": partial(random_skip, generator=generator)} | predictions
    return {name: _Baseline(name, schema, predict) for name, predict in predictions.items()}


class _Trained:
    """A trained model and its counts.

    Args:
        model: The model, on the device of the batches.
        settings: The settings it was trained with.
        run: The result of its training.
        sharpness: Sharpness of the prediction; ``None``: that of the settings.
        schema: The schema of the sessions.
    """

    def __init__(
        self,
        model: SessionModel,
        settings: Settings,
        run: Run,
        sharpness: float | None,
        schema: Schema,
    ) -> None:
        self.schema = schema
        self.model, self.settings, self.run = model, settings, run
        self.sharpness = sharpness
        self.tally = SkipTally()
        self.deciders: Deciders | None = None
        if isinstance(model, SessionExperts):
            self.deciders = Deciders(model.family, schema.causes)

    @torch.no_grad()
    def add(self, batch: SessionBatch, causes: tuple[Tensor, Tensor] | None) -> None:
        """Count a batch; ``causes`` as :meth:`Causes.of_batch` returns them."""
        real = ~batch.second_padding
        logits = logits_of(self.model, batch, self.settings)
        if self.deciders is None:
            predicted = probability(self.model, logits, self.settings)
        else:
            mixed = decided(logits, self.deciders.family, self.settings, self.sharpness)
            predicted = mixed.probability
            self.deciders.add(mixed.attribution.cpu(), real.cpu(), causes)
        self.tally.add((predicted > 0.5) == (batch.target > 0.5), real)

    def report(self) -> dict[str, Any]:
        """Its entry in ``evaluation.json``."""
        result: dict[str, Any] = self.tally.metrics()
        result["model"] = self.settings.model
        result["parameters"] = sum(p.numel() for p in self.model.parameters())
        if self.deciders is not None:
            family = self.deciders.family
            result["family"] = {
                "groups": dict(family.groups),
                "subsets": {name: list(of) for name, of in family.subsets.items()},
            }
            if self.settings.suffices:
                result["tolerance"] = TOLERANCE
            else:
                result["sharpness"] = self.settings.power(self.sharpness)
            result |= self.deciders.report()
        result["paper"] = _paper(self.settings.model, self.schema)
        result["history"] = self.run.history
        result["best_epoch"] = self.run.best_epoch
        return result


def _named(
    runs: Sequence[tuple[tuple[SessionModel, Settings, Run], Path]],
) -> dict[str, tuple[SessionModel, Settings, Run]]:
    """Runs by the name of their model; if several have the same model, by their folder.

    Raises:
        DataError: Two runs have the same name.
    """
    models = [run[1].model for run, _ in runs]
    result = {}
    for run, path in runs:
        name = run[1].model if models.count(run[1].model) == 1 else str(path)
        if name in result:
            raise DataError(f"{path}: is named twice; name each run once")
        result[name] = run
    return result


def _paper(model: str, schema: Schema) -> dict[str, float] | None:
    """The paper's values for a model on such sessions, if it has any."""
    values = PAPER.get(schema.name, {}).get(model)
    return None if values is None else dict(zip(METRICS, values, strict=True))


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print the metrics beside the paper's, and which experts decide.

    Args:
        report: From :func:`evaluate`.
        console: Where to print.
    """
    columns = [Column("model", text=True)]
    for name in METRICS:
        columns += [Column(name), Column(f"paper {name}", optional=1, style="dim")]
    rows = []
    for name, row in report["models"].items():
        paper = row["paper"] or {}
        cells = [
            text
            for key in METRICS
            for text in (f"{100 * row[key]:.1f}", f"{paper[key]:.1f}" if key in paper else "")
        ]
        rows.append([name, *cells])
    name = "Skip prediction" if report["schema"] in TABLES else report["schema"]
    title = f"{name}, {report['sessions']:,} sessions ({report['split']}), per cent"
    number = TABLES.get(report["schema"])
    caption = "" if number is None else f"paper: table {number}, other sessions"
    print_table(console, title, columns, rows, caption)
    for name, row in report["models"].items():
        if "decided" in row:
            _print_deciders(name, row, console)


def _print_deciders(name: str, row: Mapping[str, Any], console: Console) -> None:
    columns = [Column("expert", text=True), Column("mean attribution"), Column("most attributed")]
    rows = [
        [expert, f"{100 * share:.1f}", f"{100 * row['decided'][expert]:.1f}"]
        for expert, share in row["mean_attribution"].items()
    ]
    what, rule = ("decides", "sharpness") if "sharpness" in row else ("suffices", "tolerance")
    title = f"{name}: who {what}, per cent ({rule} {row[rule]:g})"
    print_table(console, title, columns, rows)
    if "decisive" not in row:
        return
    columns = [
        Column("cause", text=True), Column("tracks", optional=1), Column("sees it"),
        Column("smallest"),
    ]  # fmt: skip
    rows = []
    for cause, counts in {**row["decisive"]["causes"], "all": row["decisive"]}.items():
        shares = (f"{100 * counts[key]:.1f}" for key in ("sees", "smallest"))
        rows.append([cause, f"{counts['tracks']:,}", *shares])
    print_table(
        console,
        f"{name}: tracks whose cause is known and decisive",
        columns,
        rows,
        "per cent whose most attributed expert sees the cause; is the smallest that does",
    )
