"""How far long work is: a bar in a terminal, elsewhere a line every ten seconds; durations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from maskmoe_kernels.experiments.shared.output import print_line

#: Seconds between two lines where there is no terminal.
_INTERVAL = 10.0
#: Columns of a terminal below which a bar would be cut off.
_NARROW = 100

Item = TypeVar("Item")
#: Takes the number of steps that are done, and what computes a text about them, such as a speed.
Advance = Callable[[int, Callable[[], str]], None]


@contextmanager
def shown_progress(
    console: Console | None, name: str, total: int, done: int = 0, unit: str = "steps"
) -> Iterator[Advance]:
    """Show how much of some work is done.

    Args:
        console: Where; ``None`` is quiet.
        name: Of the work.
        total: Number of steps.
        done: How many are done at the beginning.
        unit: What a step is, in the plural.
    """
    if console is None:
        yield lambda done, text: None
    elif console.is_terminal:
        with Progress(*_columns(console.width), console=console, transient=True) as bar:
            task = bar.add_task(name, total=total, completed=done, speed="")
            yield lambda done, text: bar.update(task, completed=done, speed=text())
    else:
        last = time.monotonic()

        def advance(done: int, text: Callable[[], str]) -> None:
            nonlocal last
            if time.monotonic() - last >= _INTERVAL:
                print_line(console, f"{name}: {done:,} of {total:,} {unit}  {text()}".rstrip())
                last = time.monotonic()

        yield advance


def counted(
    console: Console | None, name: str, items: Iterable[Item], total: int, unit: str
) -> Iterator[Item]:
    """``items``, while :func:`shown_progress` counts those that the caller is done with."""
    with shown_progress(console, name, total, unit=unit) as advance:
        for done, item in enumerate(items, start=1):
            yield item
            advance(done, lambda: "")


def _columns(width: int) -> list[ProgressColumn]:
    if width < _NARROW:
        return [TextColumn("{task.description}"), TaskProgressColumn()]
    return [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    ]


def duration(seconds: float) -> str:
    """In words, such as "90 s" or "12 min"."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
