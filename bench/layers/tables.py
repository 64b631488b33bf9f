"""Tables of one case: ours by phase, and the times of all contenders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.counts import PHASES
from bench.layers.ratios import HOT, RECORDED, Line, Result, Time, case_of, lines, modes_of


def print_result(result: Result, console: Console) -> None:
    """Print ours beside the best rival and the floor, then medians and errors of all contenders."""
    table = Table(title=f"{case_of(result)}, density {result['density']:.2f}", title_justify="left")
    heads = (
        "ours",
        "us",
        "quartiles",
        "GFLOPS",
        "GB/s",
        "x best rival",
        "x best of any",
        "x floor",
    )
    for head in heads:
        table.add_column(head, justify="left" if head == "ours" else "right")
    modes = modes_of([result])
    for mode in modes:
        for line in lines(result, mode):
            table.add_row(*_cells(line))
    console.print(table)
    for mode in modes:
        console.print(_contenders(result, mode))
    for name, record in result["contenders"].items():
        if "unavailable" in record:
            text = f"  {name}: not measured: {record['unavailable']}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        if "no_graph" in record:
            text = f"  {name}: no CUDA graph: {record['no_graph']}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)


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


def _contenders(result: Result, mode: str) -> Table:
    key = RECORDED[mode]
    table = Table(
        "" if mode == HOT else mode, *(f"{phase}, us" for phase in PHASES), "error", "note"
    )
    for column in table.columns[1:-1]:
        column.justify = "right"
    for name, record in result["contenders"].items():
        if key in record:
            cells = [_time(record[key].get(phase)) for phase in PHASES]
            table.add_row(name, *cells, _error(record), _note(record, key))
    return table


def _time(sample: Mapping[str, Any] | None) -> str:
    return "-" if sample is None else f"{sample['us']:,.1f}"


def _error(record: Mapping[str, Any]) -> str:
    return f"{max(record['error'].values()):.0e}" if record.get("error") else "-"


def _note(record: Mapping[str, Any], key: str) -> str:
    fewer = {phase: s["fewer"] for phase, s in record[key].items() if "fewer" in s}
    notes = [record["note"]] if record["note"] else []
    notes += [f"{phase}: few samples, {reason}" for phase, reason in fewer.items()]
    return "; ".join(notes)
