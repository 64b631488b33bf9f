"""Sessions in words: fills the templates of a schema from the rows of a session.

A template is a text with fields in braces, each the name of a column, of a feature of the past, or
``run``, which says how the labels of half A end. After a colon stands how the value is written:

==============  ===========================================================================
``{x}``         as it is; a name as ``words.names`` of the schema says
``{x:.2f}``     as Python formats it
``{x:a|b}``     ``a`` where it is true or above 1/2, else ``b``
``{x:sum|a}``   the sum over half A in place of the # in ``a``; nothing where the sum is 0
``{x:weekday}`` the weekday of a date or time
``{x:min}``     seconds as minutes:seconds
==============  ===========================================================================
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any

from maskmoe_kernels.experiments.skip.data.columns import MSSD
from maskmoe_kernels.experiments.skip.schema.schema import Group, Schema

_WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
#: Features of a group without a template that a reason mentions.
_MENTIONED = 4


class _Filler(string.Formatter):
    """Fills templates.

    Args:
        schema: The schema.
        first: Rows of half A.
        row: The row whose values are filled in.
    """

    def __init__(self, schema: Schema, first: Sequence[Mapping[str, Any]], row: Mapping[str, Any]):
        self.schema, self.first, self.row = schema, first, row

    def get_value(self, key: Any, args: Any, kwargs: Any) -> Any:
        return str(key), run_in_words(self.first, self.schema) if key == "run" else self.row[key]

    def format_field(self, value: Any, format_spec: str) -> str:
        name, value = value
        if format_spec.startswith("sum|"):
            total = sum(row[name] for row in self.first)
            return str(format_spec).removeprefix("sum|").replace("#", f"{total}") if total else ""
        if "|" in format_spec:
            return str(format_spec).split("|", 1)[0 if value > 0.5 else 1]
        if format_spec == "weekday":
            if not isinstance(value, date):
                value = datetime.fromtimestamp(value / 1000, UTC)
            day: int = value.weekday()
            return _WEEKDAYS[day]
        if format_spec == "min":
            minutes, seconds = divmod(round(value), 60)
            return f"{minutes}:{seconds:02d}"
        if names := self._names(name):
            word = names[int(value)]
            return self.schema.said.get(word, word)
        return str(format(value, format_spec))

    def _names(self, name: str) -> tuple[str, ...]:
        for table in (self.schema.events, self.schema.items, self.schema.users):
            if table is not None and name in table.by_name:
                return table.by_name[name].names
        return ()


def header_in_words(rows: list[dict[str, Any]], schema: Schema = MSSD) -> str:
    """A session in words: its length, its start and context, and the labels of half A.

    Args:
        rows: All rows of the session, or of its slice.
        schema: The schema.
    """
    first = rows[: len(rows) // 2]
    label, holder = schema.events.label, _label_group(schema)
    parts = [f"{len(rows)} tracks"]
    if schema.header:
        parts.append(_fill(schema.header, schema, first, rows[0]))
    context = (g for g in schema.groups if g.halves == "A" and g != holder and g.words)
    parts += [_fill(group.words, schema, first, first[-1]) for group in context]
    count = sum(bool(row[label]) for row in first)
    return (
        f"Session {rows[0]['session_id']}: {', '.join(parts)}. "
        f"Of the first {len(first)} tracks {count} were {schema.verbs[1]}; "
        f"{_fill(holder.words or '{run}', schema, first, first[-1])}."
    )


def reason_in_words(
    groups: Sequence[str], first: list[dict[str, Any]], row: Any, schema: Schema = MSSD
) -> str:
    """What an expert sees when it predicts a track of half B.

    Args:
        groups: The subset of the expert.
        first: Rows of half A.
        row: The row of the track, with its raw features.
        schema: The schema.
    """
    seen = [group for group in schema.groups if group.name in groups]
    reasons = [_group_in_words(group, first, row, schema) for group in seen]
    return "; ".join(filter(None, reasons)) or "the place in the session"


def run_in_words(first: Sequence[Mapping[str, Any]], schema: Schema) -> str:
    """How the labels of half A end."""
    labels = [bool(row[schema.events.label]) for row in first]
    run = next((k for k, one in enumerate(reversed(labels)) if one != labels[-1]), len(labels))
    verb = schema.verbs[labels[-1]]
    return f"the last {run} were {verb}" if run > 1 else f"the last was {verb}"


def _label_group(schema: Schema) -> Group:
    label = schema.events.label
    return next(g for g in schema.groups if any(f.source == label for f in g.features))


def _fill(template: str, schema: Schema, first: Sequence[Any], row: Any) -> str:
    return _Filler(schema, first, row).format(template)


def _group_in_words(group: Group, first: list[dict[str, Any]], row: Any, schema: Schema) -> str:
    row = row if "B" in group.halves else first[-1]
    if group.words:
        return _fill(group.words, schema, first, row)
    if group == _label_group(schema):
        return run_in_words(first, schema)
    if group.features[0].encoding == "embedding":
        return "who the user is"
    known = [f.source for f in group.features if f.source in row and f.table != "places"]
    told = [name for name in dict.fromkeys(known) if not name.startswith("session_")]
    fill = _Filler(schema, first, row)
    values = []
    for name in told[:_MENTIONED]:
        spec = ".3g" if isinstance(row[name], float) and not fill._names(name) else ""
        values.append(f"{name} {fill.format_field((name, row[name]), spec)}")
    return ", ".join(values)
