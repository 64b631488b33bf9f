"""The summary of a run: geometric means, worst cases, and every loss by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from bench.counts import PHASES
from bench.layers.ratios import COLD, GRAPH, HOT, OURS, Line, Result, case_of, lines, modes_of
from bench.statistics import geometric_mean
from maskmoe_kernels.experiments.shared.output import Column, print_line, print_table

#: Means are over batches of at least this size: with fewer rows, a call's overhead dominates.
LARGE = 2048
WORST = 5


def summarize(results: Sequence[Result]) -> dict[str, Any]:
    """Means by dtype and phase, the worst cases, the losses, and the cases that ours failed.

    ``modes`` holds the same for cold inputs and for CUDA graphs.
    """
    others = [mode for mode in modes_of(results) if mode != HOT]
    return {
        "large": LARGE,
        **_of_mode(results, HOT, LARGE),
        "failed": {
            str(case_of(result)): result["contenders"][OURS].get("unavailable", "not measured")
            for result in results
            if not lines(result)
        },
        # CUDA graphs are measured for few rows only, so their means are over all batches.
        "modes": {mode: _of_mode(results, mode, LARGE if mode == COLD else 0) for mode in others},
    }


def _of_mode(results: Sequence[Result], mode: str, least: int) -> dict[str, Any]:
    found = [line for result in results for line in lines(result, mode)]
    compared = sorted(
        ((line.speedup, line) for line in found if line.speedup is not None), key=lambda p: p[0]
    )
    dtypes = dict.fromkeys(line.case.dtype for line in found)
    return {
        "means": [
            _means([x for x in found if x.case.batch >= least], dtype, phase)
            for dtype in dtypes
            for phase in PHASES
        ],
        "worst": {
            phase: [_entry(line) for _, line in compared if line.phase == phase][:WORST]
            for phase in PHASES
        },
        "losses": [_entry(line) for speedup, line in compared if speedup < 1],
        "compared": len(compared),
    }


def _means(found: Sequence[Line], dtype: str, phase: str) -> dict[str, Any]:
    large = [line for line in found if (line.case.dtype, line.phase) == (dtype, phase)]
    return {
        "dtype": dtype,
        "phase": phase,
        "cases": len(large),
        "speedup": geometric_mean(x.speedup for x in large if x.speedup is not None),
        "speedup_any": geometric_mean(x.speedup_any for x in large if x.speedup_any is not None),
        "over_floor": geometric_mean(x.over_floor for x in large if x.over_floor is not None),
    }


def _entry(line: Line) -> dict[str, Any]:
    return {
        "case": str(line.case),
        "phase": line.phase,
        "speedup": line.speedup,
        "rival": None if line.best is None else line.best.name,
        "over_floor": line.over_floor,
    }


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Means, worst cases and losses as tables."""
    _print_means(f"Geometric means over cases with B >= {summary['large']}", summary, console)
    _print_mode(summary, "", console)
    for mode, part in summary.get("modes", {}).items():
        which = "all cases" if mode == GRAPH else f"cases with B >= {summary['large']}"
        _print_means(f"{mode.capitalize()}: geometric means over {which}", part, console)
        _print_mode(part, f", {mode}", console)
    for case, reason in summary["failed"].items():
        text = f"ours did not run: {case}: {reason}"
        print_line(console, text, "bold red")


def _print_means(title: str, summary: dict[str, Any], console: Console) -> None:
    columns = [
        Column("dtype", text=True),
        Column("phase", text=True),
        Column("cases", optional=2),
        Column("x best rival"),
        Column("x best of any", optional=1),
        Column("x floor"),
    ]
    rows = []
    for mean in summary["means"]:
        ratios = (mean[name] for name in ("speedup", "speedup_any", "over_floor"))
        cells = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        rows.append([mean["dtype"], mean["phase"], str(mean["cases"]), *cells])
    print_table(console, title, columns, rows)


def _print_mode(summary: dict[str, Any], mode: str, console: Console) -> None:
    worst = [entry for some in summary["worst"].values() for entry in some]
    _print_entries(f"Worst cases{mode}", worst, console)
    losses = summary["losses"]
    if losses:
        _print_entries(f"Losses{mode}: {len(losses)} of {summary['compared']}", losses, console)
    else:
        print_line(console, f"No loss{mode} in {summary['compared']} comparisons.")


def _print_entries(title: str, entries: Sequence[dict[str, Any]], console: Console) -> None:
    columns = [
        Column("case", text=True, prose=True),
        Column("phase", text=True),
        Column("x best rival"),
        Column("best rival", text=True, optional=1),
        Column("x floor", optional=2),
    ]
    rows = []
    for entry in entries:
        floor = "-" if entry["over_floor"] is None else f"{entry['over_floor']:.2f}"
        speedup = f"{entry['speedup']:.2f}"
        rows.append([entry["case"], entry["phase"], speedup, entry["rival"], floor])
    print_table(console, title, columns, rows)
