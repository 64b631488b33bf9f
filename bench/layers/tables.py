"""Tables of one case: ours by phase, and the times of all contenders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from bench.counts import PHASES
from bench.layers.ratios import RECORDED, Line, Result, Time, case_of, lines, modes_of
from maskmoe_kernels.experiments.shared.output import Column, print_line, print_table


def print_result(result: Result, console: Console) -> None:
    """Print ours beside the best rival and the floor, then medians and errors of all contenders."""
    columns = [
        Column("ours", text=True),
        Column("us"),
        Column("quartiles", optional=2),
        Column("GFLOPS", optional=3),
        Column("GB/s", optional=3),
        Column("x best rival", prose=True),
        Column("x best of any", prose=True, optional=1),
        Column("x floor", prose=True),
    ]
    modes = modes_of([result])
    rows = [_cells(line) for mode in modes for line in lines(result, mode)]
    title = f"{case_of(result)}, density {result['density']:.2f}"
    print_table(console, title, columns, rows)
    for mode in modes:
        _print_contenders(result, mode, console)
    for name, record in result["contenders"].items():
        if "unavailable" in record:
            print_line(console, f"{name}: not measured: {record['unavailable']}")
        if "no_graph" in record:
            print_line(console, f"{name}: no CUDA graph: {record['no_graph']}")


def _cells(line: Line) -> list[str]:
    return [
        line.label,
        f"{line.ours.us:,.1f}",
        f"{line.ours.q25:,.0f}-{line.ours.q75:,.0f}",
        f"{line.gflops:,.1f}",
        f"{line.gbs:,.1f}",
        _against(line.speedup, line.best),
        _against(line.speedup_any, line.any),
        _against(line.over_floor, line.floor),
    ]


def _against(ratio: float | None, other: Time | None) -> str:
    return "-" if ratio is None or other is None else f"{ratio:.2f} ({other.name})"


def _print_contenders(result: Result, mode: str, console: Console) -> None:
    key = RECORDED[mode]
    columns = [
        Column("contender", text=True),
        *(Column(f"{phase}, us") for phase in PHASES),
        Column("error", optional=1),
        Column("note", text=True, prose=True, optional=2),
    ]
    rows = [
        [
            name,
            *(_time(record[key].get(phase)) for phase in PHASES),
            _error(record),
            _note(record, key),
        ]
        for name, record in result["contenders"].items()
        if key in record
    ]
    print_table(console, f"All contenders, {mode}", columns, rows)


def _time(sample: Mapping[str, Any] | None) -> str:
    return "-" if sample is None else f"{sample['us']:,.1f}"


def _error(record: Mapping[str, Any]) -> str:
    return f"{max(record['error'].values()):.0e}" if record.get("error") else "-"


def _note(record: Mapping[str, Any], key: str) -> str:
    fewer = {phase: s["fewer"] for phase, s in record[key].items() if "fewer" in s}
    notes = [record["note"]] if record["note"] else []
    notes += [f"{phase}: few samples, {reason}" for phase, reason in fewer.items()]
    return "; ".join(notes)
