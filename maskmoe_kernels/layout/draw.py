"""A text picture of a layout's blocks, for documentation and error messages."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.blocks import BlockLayout

#: Present and routed, present and not routed, absent, left out.
ROUTED, STOPPED, ABSENT, ELIDED = "█", "░", "·", "…"

_LINE = 100
_LONGEST_NAME = 24


def draw_layout(
    layout: BlockLayout,
    row_names: Sequence[str] | None = None,
    col_names: Sequence[str] | None = None,
    max_blocks: int = 40,
    width: int | None = None,
) -> str:
    """Picture of the blocks: one line per row block, one column per column block.

    Widths (units of a row block, features of a column block) stand beside the names. Columns
    that do not fit side by side under their names are numbered, and listed below.

    Args:
        layout: What to draw.
        row_names: One name per row block; numbers by default.
        col_names: One name per column block.
        max_blocks: Most rows and most columns to draw; the middle of what is longer is left
            out, marked ``…``, and the text says how much. At least 2.
        width: Of a terminal, in characters: columns that do not fit are left out likewise, so
            that no line of blocks is broken. ``None``: all up to ``max_blocks``.

    Returns:
        Lines without a final line break.

    Raises:
        LayoutError: A number of names that does not fit, or ``max_blocks`` below 2.

    Example:
        >>> family = SubsetFamily.powerset({"x1": 1, "x2": 1})
        >>> print(draw_layout(family.hidden_layout(16, 16), family.names, family.names))
        48 outputs x 48 inputs: 3 x 3 blocks, 5 present, density 0.556
        <BLANKLINE>
                     x1  x2  x1+x2
        name   size  16  16     16
        x1       16   █   ·      ·
        x2       16   ·   █      ·
        x1+x2    16   ░   ░      █
        <BLANKLINE>
        █ present, gradient to the input routed   ░ present, gradient stopped   · absent
    """
    if max_blocks < 2:
        raise LayoutError(f"max_blocks must be at least 2, got {max_blocks}")
    rows = _names("row_names", row_names, len(layout.row_sizes))
    cols = _names("col_names", col_names, len(layout.col_sizes))
    shown_rows, shown_cols = _shown(len(rows), max_blocks), _shown(len(cols), max_blocks)
    left = _left([rows[r] for r in shown_rows if r is not None], layout.row_sizes)
    widths = [1 if c is None else _width(cols[c], layout.col_sizes[c]) for c in shown_cols]
    line = width or _LINE
    by_name = sum(left) + 2 + sum(w + 2 for w in widths) <= line
    if not by_name:
        if width is not None:
            shown_cols = _fitting(len(cols), max_blocks, (width - sum(left) - 1) // 2)
        widths = [1] * len(shown_cols)
    lines = [_title(layout), "", *_header(layout, cols, shown_cols, left, widths, by_name)]
    lines += _body(layout, rows, shown_rows, shown_cols, left, widths)
    if not by_name:
        lines += ["", *_column_list(layout, cols, shown_cols, line)]
    return "\n".join([*lines, "", *_notes(layout, shown_rows, shown_cols)])


def _title(layout: BlockLayout) -> str:
    return (
        f"{layout.out_features} outputs x {layout.in_features} inputs: "
        f"{len(layout.row_sizes)} x {len(layout.col_sizes)} blocks, {layout.num_blocks} present, "
        f"density {layout.density:.3f}"
    )


def _names(argument: str, names: Sequence[str] | None, count: int) -> list[str]:
    if names is None:
        return [str(k) for k in range(count)]
    if len(names) != count:
        raise LayoutError(f"{argument} must hold {count} names, got {len(names)}")
    return [str(name) for name in names]


def _width(name: str, size: int) -> int:
    return max(len(_short(name)), len(str(size)))


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + ELIDED


def _shown(count: int, most: int) -> list[int | None]:
    """Positions to draw; ``None`` stands for those left out in the middle."""
    if count <= most:
        return list(range(count))
    first = (most + 1) // 2
    return [*range(first), None, *range(count - (most - first), count)]


def _fitting(count: int, most: int, cells: int) -> list[int | None]:
    """:func:`_shown`, in so many cells; the mark of what is left out is one of them."""
    return _shown(count, most if count <= cells else max(2, min(most, cells - 1)))


def _left(names: Sequence[str], sizes: Sequence[int]) -> tuple[int, int]:
    """Widths of the two columns on the left: name and size."""
    name = max(len("name"), *(len(_short(n)) for n in names))
    return name, max(len("size"), len(str(max(sizes)))) + 2


def _header(
    layout: BlockLayout,
    cols: Sequence[str],
    shown: Sequence[int | None],
    left: tuple[int, int],
    widths: Sequence[int],
    by_name: bool,
) -> list[str]:
    corner = f"{'name':<{left[0]}}{'size':>{left[1]}}"
    if not by_name:  # numbers read downwards
        digits = len(str(len(cols) - 1))
        numbers = [ELIDED * digits if c is None else f"{c:>{digits}}" for c in shown]
        labels = [" " * sum(left)] * (digits - 1) + [corner]
        return [_line(label, [n[d] for n in numbers], widths) for d, label in enumerate(labels)]
    names = [ELIDED if c is None else _short(cols[c]) for c in shown]
    sizes = ["" if c is None else str(layout.col_sizes[c]) for c in shown]
    return [_line(" " * sum(left), names, widths), _line(corner, sizes, widths)]


def _body(
    layout: BlockLayout,
    rows: Sequence[str],
    shown_rows: Sequence[int | None],
    shown_cols: Sequence[int | None],
    left: tuple[int, int],
    widths: Sequence[int],
) -> list[str]:
    lines = []
    for r in shown_rows:
        if r is None:
            lines.append(_line(f"{ELIDED:<{sum(left)}}", [ELIDED] * len(shown_cols), widths))
            continue
        cells = [ELIDED if c is None else _glyph(layout, r, c) for c in shown_cols]
        label = f"{_short(rows[r]):<{left[0]}}{layout.row_sizes[r]:>{left[1]}}"
        lines.append(_line(label, cells, widths))
    return lines


def _glyph(layout: BlockLayout, row: int, col: int) -> str:
    if not layout.present[row, col]:
        return ABSENT
    return ROUTED if layout.routes_grad[row, col] else STOPPED


def _line(label: str, cells: Sequence[str], widths: Sequence[int]) -> str:
    gap = "  " if max(widths) > 2 else " "
    text = gap.join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
    return f"{label}  {text}".rstrip()


def _column_list(
    layout: BlockLayout, cols: Sequence[str], shown: Sequence[int | None], line: int
) -> list[str]:
    alike = len(set(layout.col_sizes)) == 1
    head = f"columns, each of size {layout.col_sizes[0]}" if alike else "columns"
    if alike and cols == [str(c) for c in range(len(cols))]:
        return [head]
    listed = []
    for c in shown:
        if c is None:
            listed.append(ELIDED)
            continue
        entry = str(c) if cols[c] == str(c) else f"{c} {_short(cols[c])}"
        listed.append(entry if alike else f"{entry} ({layout.col_sizes[c]})")
    # Entries stay whole: their blanks do not count as places to break.
    text = ", ".join(entry.replace(" ", "\0") for entry in listed)
    wrapped = textwrap.wrap(f"{head}: {text}", line, break_long_words=False)
    return [text.replace("\0", " ") for text in wrapped]


def _notes(
    layout: BlockLayout, shown_rows: Sequence[int | None], shown_cols: Sequence[int | None]
) -> list[str]:
    present = f"{ROUTED} present"
    if not layout.routes_all:
        present += f", gradient to the input routed   {STOPPED} present, gradient stopped"
    notes = [f"{present}   {ABSENT} absent"]
    for what, shown, sizes in (
        ("row", shown_rows, layout.row_sizes),
        ("column", shown_cols, layout.col_sizes),
    ):
        if None in shown:
            left_out = len(sizes) - len(shown) + 1
            notes.append(f"{ELIDED} {left_out} of {len(sizes)} {what} blocks are not drawn")
    if layout.row_order is not None or layout.col_order is not None:
        notes.append("interleaved: the units of a block do not all lie side by side")
    return notes
