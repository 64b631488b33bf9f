"""What the commands print: lines, records and tables.

In a terminal, text is wrapped between words and a table shows the columns that fit. Elsewhere (a
pipe, a file) nothing is wrapped and nothing is left out: a message or a record is one line, and a
table is tab-separated lines below one with the names of its columns. No text is taken for rich's
markup, so brackets in titles of movies or in hints stay as they are.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

#: What a column of prose needs at the least; narrower ones are hard to read.
_PROSE = 24
_NO_BREAK_SPACE = "\u00a0"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: Its header, in full words; it may be wrapped.
        text: Whether its cells are text and not numbers, which are aligned at the right.
        prose: Whether its cells may be wrapped.
        optional: Where the terminal is too narrow, columns of the largest number are left out
            first; 0 stays.
        style: Of its cells, in rich's words.
    """

    name: str
    text: bool = False
    prose: bool = False
    optional: int = 0
    style: str = ""


def open_console(stderr: bool = False) -> Console:
    """The console of a command: stdout or stderr, without markup and highlighting."""
    console = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    console.soft_wrap = not console.is_terminal
    return console


def print_line(console: Console, text: str, style: str | None = None) -> None:
    """A message: wrapped between words in a terminal, one line elsewhere."""
    if console.is_terminal:
        _print(console, Text(text), style=style)
    else:
        _print_raw(console, " ".join(text.split()))


def print_picture(console: Console, picture: str) -> None:
    """Lines of a picture made of characters; a terminal wraps those that are too long."""
    for line in picture.split("\n"):
        if console.is_terminal:
            _print(console, Text(line))
        else:
            _print_raw(console, line)


def print_record(console: Console, title: str, fields: Mapping[str, str]) -> None:
    """A title and named values: wrapped between values in a terminal, else one line with tabs."""
    pairs = [f"{name} {value}".strip() for name, value in fields.items()]
    if not console.is_terminal:
        _print_raw(console, "\t".join([title, *pairs]))
        return
    kept = [
        text.replace(" ", _NO_BREAK_SPACE) if cell_len(text) <= console.width - 2 else text
        for text in [title, *pairs]
    ]
    line = "  ".join(kept)
    wrapped = textwrap.fill(
        line, console.width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    _print(console, Text(wrapped.replace(_NO_BREAK_SPACE, " ")))


def print_table(
    console: Console,
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Sequence[str | Text]],
    note: str = "",
) -> None:
    """A table: of the columns that fit in a terminal, of all of them elsewhere.

    A terminal that is too narrow for the columns that must stay shows a record a row.

    Args:
        console: Where to print.
        title: Above the table; elsewhere than in a terminal after ``# ``.
        columns: Its columns; the first one names the row.
        rows: One cell a column.
        note: Below the table, likewise.
    """
    if not console.is_terminal:
        _print_separated(console, title, columns, rows, note)
        return
    shown = _fitting(columns, rows, console.width)
    if shown is None:
        _print(console, Text(title), style="table.title")
        for row in rows:
            cells = [str(cell) for cell in row]
            names = [column.name for column in columns[1:]] if len(columns) > 2 else [""]
            fields = {n: cell for n, cell in zip(names, cells[1:], strict=True) if cell}
            print_record(console, cells[0], fields)
    else:
        _print(console, _table(title, columns, rows, shown, console.width))
        if hidden := [c.name for k, c in enumerate(columns) if k not in shown]:
            print_line(console, f"No room for: {', '.join(hidden)}.", style="table.caption")
    if note:
        print_line(console, note, style="table.caption")


def print_written(
    console: Console, written: str, figures: str, folder: Path, missing: str | None
) -> None:
    """Where the results are.

    Args:
        console: Where to print.
        written: What was written in any case, such as "report".
        figures: What was drawn unless something is missing, such as "figures".
        folder: Where it is.
        missing: Why nothing was drawn, in words; ``None`` if it was drawn.
    """
    if missing is None:
        print_line(console, f"{written} and {figures}: {folder}")
        return
    print_line(console, f"{written}: {folder}")
    print_line(console, f"no {figures}: {missing}")


def _print_separated(
    console: Console,
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Sequence[str | Text]],
    note: str,
) -> None:
    lines = [[column.name for column in columns], *([str(cell) for cell in row] for row in rows)]
    _print_raw(console, f"# {title}")
    for line in lines:
        _print_raw(console, "\t".join(" ".join(cell.split()) for cell in line))
    if note:
        _print_raw(console, f"# {note}")


def _print_raw(console: Console, line: str) -> None:
    """A line as it is: rich would replace its tabs."""
    _print(console, Segments([Segment(line), Segment.line()]), soft_wrap=True)


def _print(console: Console, shown: RenderableType, **options: Any) -> None:
    try:
        console.print(shown, **options)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise OSError(
            f"what the command prints cannot be written: {error.strerror}. Free some space, or "
            "send it elsewhere"
        ) from error


def _fitting(
    columns: Sequence[Column], rows: Sequence[Sequence[str | Text]], width: int
) -> list[int] | None:
    """The columns to show, by number; ``None`` where not even those that must stay fit."""
    shown = list(range(len(columns)))
    while _frame(len(shown)) + sum(_least(columns, rows, k) for k in shown) > width:
        last = max(shown, key=lambda k: (columns[k].optional, k))
        if not columns[last].optional:
            return None
        shown.remove(last)
    return shown


def _table(
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Sequence[str | Text]],
    shown: Sequence[int],
    width: int,
) -> Table:
    """A table of the columns ``shown``; what is left of the width goes to prose last."""
    widths = {k: _least(columns, rows, k) for k in shown}
    spare = width - _frame(len(shown)) - sum(widths.values())
    for k in sorted(shown, key=lambda k: columns[k].prose):
        more = min(spare, _most(columns, rows, k) - widths[k])
        widths[k] += more
        spare -= more
    table = Table(title=Text(title))
    for k, column in enumerate(columns):
        if k in widths:
            table.add_column(
                Text(column.name),
                justify="left" if column.text else "right",
                width=widths[k],
                style=column.style or None,
                overflow="fold",
            )
    for row in rows:
        cells = (cell for k, cell in enumerate(row) if k in widths)
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))
    return table


def _frame(columns: int) -> int:
    """Characters of a table that are not its cells: a line, and two spaces a column."""
    return 3 * columns + 1


def _least(columns: Sequence[Column], rows: Sequence[Sequence[str | Text]], k: int) -> int:
    """The width below which a word of column ``k`` would be cut."""
    cells = [str(row[k]) for row in rows]
    words = columns[k].name.split()
    if not columns[k].prose:
        return max(map(cell_len, [*cells, *words]))
    words += [word for cell in cells for word in cell.split()]
    longest = max(map(cell_len, cells), default=0)
    return max(min(_PROSE, longest), *map(cell_len, words))


def _most(columns: Sequence[Column], rows: Sequence[Sequence[str | Text]], k: int) -> int:
    """The width at which nothing of column ``k`` is wrapped."""
    return max(cell_len(text) for text in [columns[k].name, *(str(row[k]) for row in rows)])
