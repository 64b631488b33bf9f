"""Parses the groups of features and the features of the past."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from maskmoe_kernels.experiments.skip.schema.column import Column
from maskmoe_kernels.experiments.skip.schema.schema import (
    ENCODINGS,
    PLACES,
    Feature,
    Group,
    Past,
    Table,
)
from maskmoe_kernels.experiments.skip.schema.toml_file import Node

_HALVES = ("A", "B", "AB")
# Kinds of event columns that an encoding takes.
_TAKES = {
    "value": ("flag", "integer", "number"), "one_hot": ("name",), "circle": ("integer",),
    "weekday": ("date", "time"), "weekend": ("date", "time"),
}  # fmt: skip
_MOST_EMBEDDED = 512


def parse_past(
    name: str, node: Node, relations: tuple[str, ...], duration: Callable[[Node, str], int]
) -> Past:
    """A feature of the events before a session."""
    kind = node.choice("kind", ("rate", "discounted_rate", "count", "relation"))
    if kind == "relation":
        relation = node.choice("relation", relations or ("(the schema declares none)",))
        node.finish()
        return Past(name, kind, relation=relation)
    of = node.choice("of", ("user", "item", "pair"))
    half_life, window = duration(node, "half_life"), duration(node, "window")
    if (kind == "discounted_rate") != bool(half_life):
        raise node.fail("expected half_life with discounted_rate, and with it alone.", "half_life")
    if kind == "discounted_rate" and of == "item":
        raise node.fail('expected of = "user" or "pair" for a discounted_rate, got "item".', "of")
    if window and kind != "count":
        raise node.fail("expected window with kind = count alone.", "window")
    node.finish()
    return Past(name, kind, of, half_life, window)


def parse_group(
    name: str,
    node: Node,
    tables: Mapping[str, Table | None],
    past: Mapping[str, Past],
) -> Group:
    """A group and its features."""
    halves = node.choice("halves", _HALVES)
    features = tuple(_feature(inner, tables, past) for inner in node.array("features"))
    if not features:
        raise node.fail("expected features, got none.", "features")
    if len(features) > 1 and any(f.encoding == "embedding" for f in features):
        raise node.fail("expected an embedding to be a group of its own.", "features")
    words = node.optional("words", str) or ""
    node.finish()
    return Group(name, halves, features, words)


def parse_experts(
    node: Node, groups: tuple[Group, ...]
) -> tuple[tuple[Group, ...], dict[str, tuple[str, ...]]]:
    """The experts; and the groups, where one that some expert sees in one of its halves is two.

    An expert is a list of groups, seen in every half that they exist in, or a list for each half.
    """
    seen: dict[str, dict[str, tuple[str, ...]]] = {}
    for key, value in node.value.items():
        if isinstance(value, dict):
            inner = node.table(key)
            seen[key] = {half: _names(inner, half, groups, half) for half in "AB"}
            inner.finish()
        else:
            names = _names(node, key, groups, "AB")
            there = {g.name: g.halves for g in groups}
            seen[key] = {h: tuple(n for n in names if h in there[n]) for h in "AB"}
    halved = {
        group.name
        for group in groups
        for of in seen.values()
        if group.halves == "AB" and (group.name in of["A"]) != (group.name in of["B"])
    }
    parts: list[Group] = []
    for group in groups:
        if group.name not in halved:
            parts.append(group)
            continue
        if group.features[0].encoding == "embedding":
            raise node.fail(
                f"expected each expert to see the embedding {group.name} in both halves or none."
            )
        parts.append(replace(group, name=f"{group.name} in A", halves="A", words=""))
        parts.append(replace(group, name=f"{group.name} in B", halves="B"))
    experts = {}
    for key, of in seen.items():
        found = {f"{name} in {half}" for half in "AB" for name in of[half] if name in halved}
        found |= {*of["A"], *of["B"]} - halved
        experts[key] = tuple(part.name for part in parts if part.name in found)
    called = [part.name for part in parts]
    if twice := sorted({name for name in called if called.count(name) > 1}):
        raise node.fail(f"expected other names of groups than {twice}, which halves of others get.")
    return tuple(parts), experts


def _names(node: Node, key: str, groups: tuple[Group, ...], halves: str) -> tuple[str, ...]:
    """Names of groups that exist in one of ``halves``."""
    names = node.names(key)
    known = [g.name for g in groups if set(g.halves) & set(halves)]
    if unknown := [name for name in names if name not in known]:
        there = "" if halves == "AB" else f" of half {halves}"
        raise node.fail(f"expected groups{there} out of {', '.join(known)}, got {unknown}.", key)
    return names


def _feature(node: Node, tables: Mapping[str, Table | None], past: Mapping[str, Past]) -> Feature:
    of = node.get("of", str)
    encoding = node.choice("as", ENCODINGS, "value")
    if encoding == "embedding":
        return _embedding(node, of, tables)
    table, _, source = of.rpartition(".")
    table = {"": "events", "item": "items", "user": "users", "past": "past"}.get(table, table)
    column = _source(node, of, table, source, tables, past)
    if column is not None and table == "events" and column.kind not in _TAKES[encoding]:
        raise node.fail(
            f'expected as = "{encoding}" of a column of kind {" or ".join(_TAKES[encoding])}, got '
            f"{source} of kind {column.kind}.", "as",
        )  # fmt: skip
    if (table != "events" or column is None) and encoding != "value":
        raise node.fail(f'expected as = "value" for {of}, got {encoding!r}.', "as")
    numbers = {"log": node.get("log", bool, False), "divide": node.get("divide", float, 1.0)}
    numbers["subtract"] = node.optional("subtract", float) or 0.0
    period = node.get("period", int) if encoding == "circle" else 0
    if not numbers["divide"] or (encoding == "circle" and period < 2):
        raise node.fail("expected divide other than 0, and period from 2.", "period")
    own, columns = _column_names(node, table, source, encoding, column, tables)
    node.finish()
    return Feature(table, source, encoding, columns, period=period, names=own, **numbers)  # type: ignore[arg-type]


def _embedding(node: Node, of: str, tables: Mapping[str, Table | None]) -> Feature:
    events = tables["events"]
    width = node.get("width", int)
    if of != "user" or not getattr(events, "user", ""):
        raise node.fail(f'expected an embedding of "user", and user in events, got {of!r}.', "of")
    if not 1 <= width <= _MOST_EMBEDDED:
        raise node.fail(f"expected width from 1 to {_MOST_EMBEDDED}, got {width}.", "width")
    node.finish()
    columns = tuple(f"user_{k}" for k in range(width))
    return Feature("users", "", "embedding", columns)


def _source(
    node: Node,
    of: str,
    table: str,
    source: str,
    tables: Mapping[str, Table | None],
    past: Mapping[str, Past],
) -> Column | None:
    """The column that a feature is of; ``None`` for a place or a feature of the past."""
    if table == "past" and source in past:
        return None
    if table == "events" and source in PLACES:
        return None
    found = tables.get(table)
    if found is not None and source in found.by_name and found.by_name[source].kind != "id":
        return found.by_name[source]
    known = [f"past.{name}" for name in past] + list(PLACES)
    for key, prefix in (("events", ""), ("items", "item."), ("users", "user.")):
        other = tables.get(key)
        known += [f"{prefix}{c.name}" for c in (other.columns if other else ()) if c.kind != "id"]
    raise node.fail(f"expected a feature of one of {', '.join(known)}, got {of!r}.", "of")


def _column_names(
    node: Node,
    table: str,
    source: str,
    encoding: str,
    column: Column | None,
    tables: Mapping[str, Table | None],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of ``one_hot``: the names with a column of their own; and the names of the columns."""
    name = node.get("name", str, source)
    if encoding == "one_hot" and column is not None:
        prefix = node.get("prefix", str, "-").removeprefix("-")
        own = node.names("own", list(column.names))
        if unknown := [one for one in own if one not in column.names]:
            raise node.fail(f"expected own out of {', '.join(column.names)}, got {unknown}.", "own")
        shared = ("other",) if len(own) < len(column.names) else ()
        return own, tuple(f"{prefix}{one}" for one in (*own, *shared))
    if encoding in ("circle", "weekday"):
        return (), (f"{name}_sin", f"{name}_cos")
    found = tables.get(table)
    if table in ("items", "users") and found is not None:
        several = found.features[source]
        return (), (name,) if len(several) == 1 else several
    return (), (name,)
