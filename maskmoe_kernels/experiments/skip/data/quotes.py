"""Double quotes in csv text: which lines use them so that they can be parsed line by line."""

from __future__ import annotations

import numpy as np

from maskmoe_kernels.experiments.skip.data.arrays import Array

_NEWLINE, _RETURN, _QUOTE, _COMMA = b'\n\r",'


def badly_quoted(data: bytes) -> Array:
    """Lines, counted from 0, in which a quoted field is not closed, or quotes are inside a field.

    A quote opens a field or closes it; within a quoted field two quotes stand for one.

    Args:
        data: Whole lines, the last with its newline.
    Returns:
        ``(n,)`` int64, ascending.
    """
    text = np.frombuffer(data, np.uint8)
    quotes = (text == _QUOTE).nonzero()[0]
    ends = (text == _NEWLINE).nonzero()[0]
    line = np.searchsorted(ends, quotes)
    count = np.bincount(line, minlength=len(ends))
    ordinal = np.arange(len(quotes)) - (np.cumsum(count) - count)[line]
    before = np.where(quotes > 0, text[quotes - 1], _NEWLINE)
    after = text[quotes + 1]  # the last byte is a newline
    opens = np.isin(before, (_NEWLINE, _COMMA, _QUOTE))
    closes = np.isin(after, (_NEWLINE, _RETURN, _COMMA, _QUOTE))
    wrong = np.where(ordinal % 2 == 0, ~opens, ~closes)
    bad: Array = np.union1d(line[wrong], (count % 2).nonzero()[0])
    return bad


def replace_lines(data: bytes, lines: Array, by: bytes) -> bytes:
    """The same text with ``by`` in place of these lines, which count from 0."""
    parts = data.split(b"\n")
    for i in lines.tolist():
        parts[i] = by
    return b"\n".join(parts)
