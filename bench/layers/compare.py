"""Compare two runs: what became slower, what became faster."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from bench.counts import PHASES
from bench.layers.ratios import RECORDED, Line, case_of, line_of
from bench.machine import differences
from maskmoe_kernels.experiments.shared.output import Column, print_line, print_table


@dataclass(frozen=True)
class Change:
    """Ours in one phase of a case, in two runs; each ratio is new / old, and above 1 is slower.

    Attributes:
        old: Line of the first run.
        new: Line of the second.
        raw: Ratio of the times.
        to_floor: Ratio of the times relative to the floor of the same run.
        to_best: Ratio of the times relative to the best exact rival of the same run.
    """

    old: Line
    new: Line
    raw: float
    to_floor: float | None
    to_best: float | None

    def verdict(self, threshold: float, same_machine: bool) -> str:
        """``"slower"``, ``"faster"`` or ``""``.

        A busy machine slows down all contenders. So all ratios must agree: that of the times
        (on the same machine only), and those to the floor and to the best rival. And the
        quartiles must lie apart.
        """
        relative = [r for r in (self.to_floor, self.to_best) if r is not None]
        ratios = [self.raw, *relative] if same_machine or not relative else relative
        # Compare the quartiles as if the times had changed by the ratio closest to 1.
        old, new = self.old.ours, self.new.ours
        scale = min(ratios, key=lambda ratio: abs(ratio - 1)) / self.raw
        if min(ratios) > threshold and new.q25 * scale > old.q75:
            return "slower"
        if max(ratios) < 1 / threshold and new.q75 * scale < old.q25:
            return "faster"
        return ""


def changes(a: dict[str, Any], b: dict[str, Any]) -> list[Change]:
    """The change of every case and phase that both runs measured."""
    old = {case_of(result): result for result in a["results"]}
    found = []
    for result in b["results"]:
        before = old.get(case_of(result))
        if before is None:
            continue
        for mode, phase in itertools.product(RECORDED, PHASES):
            first, second = line_of(before, phase, mode), line_of(result, phase, mode)
            if first is not None and second is not None:
                found.append(_change(first, second))
    return found


def _change(old: Line, new: Line) -> Change:
    def ratio(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else b / a

    # speedup is rival / ours: it falls when ours gets slower.
    to_best = ratio(new.speedup, old.speedup)
    raw = new.ours.us / old.ours.us
    return Change(old, new, raw, ratio(old.over_floor, new.over_floor), to_best)


def missing(a: dict[str, Any], b: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Cases of the first run only, and of the second only."""
    cases = [[str(case_of(result)) for result in document["results"]] for document in (a, b)]
    return [c for c in cases[0] if c not in cases[1]], [c for c in cases[1] if c not in cases[0]]


def print_comparison(
    a: dict[str, Any], b: dict[str, Any], threshold: float, console: Console
) -> bool:
    """Print tables of what changed.

    Args:
        a: The earlier run.
        b: The later one.
        threshold: Changes below this ratio are ignored.
        console: Where to print.

    Returns:
        Whether something became slower.
    """
    different = differences(a["machine"], b["machine"])
    if different:
        text = "the machines differ, so only ratios within each run count: " + "; ".join(different)
        print_line(console, text, "yellow")
    found = changes(a, b)
    verdicts = [(change.verdict(threshold, not different), change) for change in found]
    for word in ("slower", "faster"):
        some = [change for verdict, change in verdicts if verdict == word]
        some.sort(key=lambda change: change.raw, reverse=word == "slower")
        if some:
            _print_changes(word, some, console)
        else:
            print_line(console, f"Nothing is {word} by more than {threshold:g}x.")
    for word, cases in zip(("first", "second"), missing(a, b), strict=True):
        if cases:
            print_line(console, f"only in the {word}: {', '.join(cases)}")
    print_line(console, f"{len(found)} phases of cases compared.")
    return any(verdict == "slower" for verdict, _ in verdicts)


def _print_changes(word: str, found: Sequence[Change], console: Console) -> None:
    columns = [
        Column("case", text=True, prose=True),
        Column("phase", text=True),
        Column("first, us", optional=1),
        Column("second, us", optional=1),
        Column("time"),
        Column("to floor", optional=2),
        Column("to best rival", optional=2),
    ]
    rows = []
    for change in found:
        ratios = (change.raw, change.to_floor, change.to_best)
        rows.append([
            str(change.old.case),
            change.old.label,
            f"{change.old.ours.us:,.1f}",
            f"{change.new.ours.us:,.1f}",
            *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        ])  # fmt: skip
    note = "Ratios are second / first: above 1 is slower."
    print_table(console, f"Ours is {word}", columns, rows, note)
