"""Judging skip models: metrics beside the paper's table 2, who decides, and who ought to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track as show
from rich.table import Table
from torch import Tensor

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.files import claim
from maskmoe_kernels.experiments.shared.metrics import SkipTally
from maskmoe_kernels.experiments.shared.report import machine, write_json
from maskmoe_kernels.experiments.shared.trainer import Run
from maskmoe_kernels.experiments.skip import figures as skip_figures
from maskmoe_kernels.experiments.skip.baselines import last_skip, mean_skip
from maskmoe_kernels.experiments.skip.data.causes import CAUSE_GROUPS, CAUSES, Causes
from maskmoe_kernels.experiments.skip.data.session_features import SKIP_2, SessionBatch
from maskmoe_kernels.experiments.skip.data.sessions import SessionDataset, Shards
from maskmoe_kernels.experiments.skip.train import Settings, load, logits_of, probability
from maskmoe_kernels.layout.subsets import SubsetFamily
from maskmoe_kernels.models.sessions import SessionExperts, SessionModel
from maskmoe_kernels.ops.selection import mixture

#: Table 2 of the paper, per cent: Acc, Acc@1 and MAA.
PAPER = {
    "last": (63.0, 74.2, 54.3),
    "mean": (61.7, 66.3, 51.7),
    "black-box-transformer": (72.2, 80.0, 62.8),
    "interpretable-transformer": (70.9, 78.8, 61.1),
}
METRICS = ("Acc", "Acc@1", "MAA")
#: Sessions judged at a time.
BATCH = 512


class Deciders:
    """Counts of who decides on the tracks of a family's model.

    Attributes:
        share: Sum of the attributions, ``(H,)`` float64.
        decided: Tracks on which an expert has the largest share, ``(H,)`` int64.
        by_cause: Of tracks whose cause is known and decisive, how many of each cause each expert
            has the largest share on, ``(causes, H)`` int64.
    """

    def __init__(self, family: SubsetFamily) -> None:
        self.family = family
        experts = family.num_experts
        self.share = torch.zeros(experts, dtype=torch.float64)
        self.decided = torch.zeros(experts, dtype=torch.int64)
        self.by_cause = torch.zeros(len(CAUSES), experts, dtype=torch.int64)

    def add(
        self, attribution: Tensor, real: Tensor, why: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Count a batch.

        Args:
            attribution: ``(B, T, H)``.
            real: Where there is a track, ``(B, T)`` bool.
            why: As :meth:`Causes.of` gives it.
        """
        experts = self.family.num_experts
        top = attribution.argmax(-1)
        self.share += attribution[real].double().sum(0)
        self.decided += torch.bincount(top[real], minlength=experts)
        if why is not None:
            cause, decisive = why[0], why[1] & real
            pairs = cause[decisive] * experts + top[decisive]
            self.by_cause += torch.bincount(pairs, minlength=self.by_cause.numel()).view_as(
                self.by_cause
            )

    def report(self) -> dict[str, Any]:
        """Shares by expert, and of the decisive tracks who sees the cause, all and each."""
        names, tracks = self.family.names, max(int(self.decided.sum()), 1)
        result: dict[str, Any] = {
            "mean_attribution": dict(zip(names, (self.share / tracks).tolist(), strict=True)),
            "decided": dict(zip(names, (self.decided.double() / tracks).tolist(), strict=True)),
        }
        if not self.by_cause.any():
            return result
        sees, smallest = sees_cause(self.family)
        causes = {}
        for name, counts, can, least in zip(CAUSES, self.by_cause, sees, smallest, strict=True):
            if total := int(counts.sum()):
                causes[name] = {
                    "tracks": total,
                    "sees": int(counts[can].sum()) / total,
                    "smallest": int(counts[least].sum()) / total,
                    "decided": dict(zip(names, (counts.double() / total).tolist(), strict=True)),
                }
        total = int(self.by_cause.sum())
        result["decisive"] = {
            "tracks": total,
            "sees": int(self.by_cause[sees].sum()) / total,
            "smallest": int(self.by_cause[smallest].sum()) / total,
            "causes": causes,
        }
        return result


def sees_cause(family: SubsetFamily) -> tuple[Tensor, Tensor]:
    """Which experts see all groups of a cause, and which of them no other one is smaller than.

    Returns:
        Two ``(causes, H)`` bool, causes in the order of ``CAUSES``.
    """
    subsets = [set(groups) for groups in family.subsets.values()]
    sees = torch.tensor([[CAUSE_GROUPS[name] <= s for s in subsets] for name in CAUSES])
    # A strict subset that sees it too is a smaller expert.
    smaller = (sees.double() @ family.strict.double().T) > 0
    return sees, sees & ~smaller


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
    """Judge the baselines and trained models; write ``evaluation.json`` and figures into ``out``.

    Args:
        data: Prepared shards.
        out: Made if missing.
        runs: Folders of ``maskmoe skip train``.
        causes: Folder of ``maskmoe skip generate``, whose sessions' causes are known.
        split: Which sessions.
        sharpness: Of the prediction; ``None``: as each model was trained.
        device: Where to compute.
        console: For progress and tables; ``None`` is quiet.

    Raises:
        DataError: Shards, a run, or the causes are missing, damaged, or do not belong together.
    """
    claim(out)
    trained = _named([(load(path, device), path) for path in runs])
    sessions = SessionDataset(Shards(data, split), BATCH)
    known = None if causes is None else Causes(causes)
    report: dict[str, Any] = {
        "data": sessions.shards.digest,
        "split": split,
        "sessions": len(sessions.shards),
        "machine": machine(),
        "models": {"last": SkipTally(), "mean": SkipTally()},
    }
    for name, (model, settings, _) in trained.items():
        report["models"][name] = _Judged(model, settings, sharpness)
    batches = show(
        sessions, "judging", sessions.schedule().batches, console=console or Console(quiet=True)
    )
    for batch in batches:
        why = None if known is None else known.of(batch.session_ids)
        _judge(batch.to(device), why, report["models"])
    for name, judged in report["models"].items():
        row: dict[str, Any] = {}
        row |= judged.metrics() if isinstance(judged, SkipTally) else judged.report()
        row["paper"] = _paper(name if name not in trained else trained[name][1].model)
        if name in trained:
            row["history"] = trained[name][2].history
            row["best_epoch"] = trained[name][2].best_epoch
        report["models"][name] = row
    write_json(out / "evaluation.json", report)
    missing = skip_figures.draw(report, out)
    if console is not None:
        print_report(report, console)
        text = f"no figures: {missing}" if missing else f"report and figures: {out}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    return report


class _Judged:
    """A trained model and what is counted of it."""

    def __init__(self, model: SessionModel, settings: Settings, sharpness: float | None) -> None:
        self.model, self.settings = model, settings
        self.sharpness = settings.sharpness if sharpness is None else sharpness
        self.tally = SkipTally()
        self.deciders = Deciders(model.family) if isinstance(model, SessionExperts) else None

    @torch.no_grad()
    def add(self, batch: SessionBatch, why: tuple[Tensor, Tensor] | None) -> None:
        real = ~batch.second_padding
        logits = logits_of(self.model, batch, self.settings)
        if self.deciders is None:
            chance = probability(self.model, logits, self.settings)
        else:
            mixed = mixture(logits, self.deciders.family, self.settings.confidence, self.sharpness)
            chance = mixed.probability
            self.deciders.add(mixed.attribution.cpu(), real.cpu(), why)
        self.tally.add((chance > 0.5) == (batch.target > 0.5), real)

    def report(self) -> dict[str, Any]:
        result: dict[str, Any] = self.tally.metrics()
        result["model"] = self.settings.model
        result["parameters"] = sum(p.numel() for p in self.model.parameters())
        if self.deciders is not None:
            family = self.deciders.family
            result["family"] = {
                "groups": dict(family.groups),
                "subsets": {name: list(of) for name, of in family.subsets.items()},
            }
            result["sharpness"] = self.sharpness
            result |= self.deciders.report()
        return result


def _judge(
    batch: SessionBatch,
    why: tuple[Tensor, Tensor] | None,
    models: Mapping[str, SkipTally | _Judged],
) -> None:
    skips = batch.first[..., SKIP_2]
    for name, judged in models.items():
        if isinstance(judged, _Judged):
            judged.add(batch, why)
            continue
        baseline = last_skip if name == "last" else mean_skip
        guess = baseline(skips, batch.first_padding) > 0.5
        judged.add(guess == (batch.target > 0.5), ~batch.second_padding)


def _named(
    runs: Sequence[tuple[tuple[SessionModel, Settings, Run], Path]],
) -> dict[str, tuple[SessionModel, Settings, Run]]:
    """Runs by their model's name; by their folder's where two are of one model."""
    models = [run[1].model for run, _ in runs]
    result = {}
    for run, path in runs:
        name = run[1].model if models.count(run[1].model) == 1 else str(path)
        if name in result:
            raise DataError(f"{path}: is named twice; name each run once")
        result[name] = run
    return result


def _paper(model: str) -> dict[str, float] | None:
    values = PAPER.get(model)
    return None if values is None else dict(zip(METRICS, values, strict=True))


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """The table beside the paper's table 2, who decides, and who ought to."""
    table = Table(
        title=f"Skip prediction, {report['sessions']:,} sessions ({report['split']}), per cent",
        caption="paper: table 2, other sessions",
    )
    table.add_column("model")
    for name in METRICS:
        table.add_column(name, justify="right")
        table.add_column("paper", justify="right", style="dim")
    for name, row in report["models"].items():
        paper = row["paper"] or {}
        cells = [
            text
            for key in METRICS
            for text in (f"{100 * row[key]:.1f}", f"{paper[key]:.1f}" if key in paper else "")
        ]
        table.add_row(name, *cells)
    console.print(table)
    for name, row in report["models"].items():
        if "decided" in row:
            _print_deciders(name, row, console)


def _print_deciders(name: str, row: Mapping[str, Any], console: Console) -> None:
    table = Table(title=f"{name}: who decides, per cent (sharpness {row['sharpness']:g})")
    for column in ("expert", "mean attribution", "most attributed"):
        table.add_column(column, justify="left" if column == "expert" else "right")
    for expert, share in row["mean_attribution"].items():
        table.add_row(expert, f"{100 * share:.1f}", f"{100 * row['decided'][expert]:.1f}")
    console.print(table)
    if "decisive" not in row:
        return
    table = Table(
        title=f"{name}: tracks whose cause is known and decisive",
        caption="per cent whose most attributed expert sees the cause; is the smallest that does",
    )
    for column in ("cause", "tracks", "sees it", "smallest"):
        table.add_column(column, justify="left" if column == "cause" else "right")
    rows = {**row["decisive"]["causes"], "all": row["decisive"]}
    for cause, counts in rows.items():
        shares = (f"{100 * counts[key]:.1f}" for key in ("sees", "smallest"))
        table.add_row(cause, f"{counts['tracks']:,}", *shares)
    console.print(table)
