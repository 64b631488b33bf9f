"""How far long work is: a bar in a terminal, elsewhere a line every ten seconds; durations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
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
#: Begins a part of some work, by its name and its bytes (``None``: not known); returns what is told
#: of each number of bytes that is done.
OpenBar = Callable[[str, int | None], Callable[[int], None]]


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
        say = _in_intervals(console)
        yield lambda done, text: say(
            lambda: f"{name}: {done:,} of {total:,} {unit}, {text()}".removesuffix(", ")
        )


@contextmanager
def shown_bytes(console: Console | None) -> Iterator[OpenBar]:
    """Show how much is done of work that has parts, such as files, which may overlap.

    Args:
        console: Where; ``None`` is quiet.
    """
    if console is None:
        yield lambda name, total: lambda count: None
    elif console.is_terminal:
        columns = _columns(console.width, of_bytes=True)
        with Progress(*columns, console=console, transient=True) as bars:

            def open_bar(name: str, total: int | None) -> Callable[[int], None]:
                task = bars.add_task(name, total=total, speed="")
                return lambda count: bars.advance(task, count)

            yield open_bar
    else:
        say = _in_intervals(console)

        def open_counter(name: str, total: int | None) -> Callable[[int], None]:
            done = 0

            def advance(count: int) -> None:
                nonlocal done
                done += count
                if count:  # else another part is on the way
                    say(lambda: f"{name}: {_megabytes(done, total)}")

            return advance

        yield open_counter


def _in_intervals(console: Console) -> Callable[[Callable[[], str]], None]:
    """What prints a line, unless one came in the last ten seconds."""
    last = time.monotonic()

    def say(text: Callable[[], str]) -> None:
        nonlocal last
        if time.monotonic() - last >= _INTERVAL:
            print_line(console, text())
            last = time.monotonic()

    return say


def _megabytes(done: int, total: int | None) -> str:
    of = "" if total is None else f" of {total / 1e6:,.1f}"
    return f"{done / 1e6:,.1f}{of} MB"


def counted(
    console: Console | None, name: str, items: Iterable[Item], total: int, unit: str
) -> Iterator[Item]:
    """``items``, while :func:`shown_progress` counts those that the caller is done with."""
    with shown_progress(console, name, total, unit=unit) as advance:
        for done, item in enumerate(items, start=1):
            yield item
            advance(done, lambda: "")


def _columns(width: int, of_bytes: bool = False) -> list[ProgressColumn]:
    if width < _NARROW:
        return [TextColumn("{task.description}"), TaskProgressColumn()]
    return [
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn() if of_bytes else MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    ]


def duration(seconds: float) -> str:
    """In words, such as "90 s" or "12 min"."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
