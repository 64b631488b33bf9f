"""Reads schemas: a TOML file to a checked :class:`Schema`."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from pathlib import Path
from string import Formatter
from typing import Any

from maskmoe_kernels.errors import DataError, LayoutError
from maskmoe_kernels.experiments.skip.schema.column import KINDS, UNITS, Column
from maskmoe_kernels.experiments.skip.schema.features import parse_experts, parse_group, parse_past
from maskmoe_kernels.experiments.skip.schema.schema import (
    Events,
    Group,
    Past,
    Relation,
    Schema,
    Sessions,
    Table,
)
from maskmoe_kernels.experiments.skip.schema.toml_file import Node
from maskmoe_kernels.layout.subsets import SubsetFamily

#: The schemas of the package, by name.
SHIPPED = ("mssd", "users")
#: Longest sessions: positions are stored in two bytes.
_MOST = 65535
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(second|minute|hour|day)s?")
#: Longest duration, in ms: times are from 1970 to 2200.
_LONGEST = 84_000 * 86_400_000
_UNITS = {"second": 1000, "minute": 60_000, "hour": 3_600_000, "day": 86_400_000}
_TAKEN = {"session_id", "session_position", "session_length", "track", "user", "line", "place"}
_TABLES = {"events", "items", "users", "tracks"}
_NAME = re.compile(r"\w[\w+ -]*")


def read_schema(name: str | Path) -> Schema:
    """Read a schema.

    Args:
        name: One of ``SHIPPED``, or the path of a TOML file.
    Raises:
        DataError: There is none, or it is invalid; the message names file and line.
    """
    if str(name) in SHIPPED:
        return shipped(str(name))
    path = Path(name)
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "bytes that are not UTF-8"
        raise DataError(
            f"{path}: expected a schema (TOML), or the name of one of {', '.join(SHIPPED)}, got "
            f"{reason}."
        ) from error
    return parse_schema(text, str(path))


@cache
def shipped(name: str) -> Schema:
    """A schema of the package, one of ``SHIPPED``."""
    file = resources.files(__package__).joinpath(f"{name}.toml")
    return parse_schema(file.read_text("utf-8"), f"{name}.toml")


def parse_schema(text: str, name: str = "schema") -> Schema:
    """The schema that a TOML text declares.

    Args:
        text: The text.
        name: Of its file, for messages.
    Raises:
        DataError: It is invalid; the message names file and line.
    """
    root = Node.parse(text, name)
    title = root.get("name", str)
    sessions = _sessions(root.table("sessions"))
    events = _events(root.table("events"), sessions)
    items, users = (_keyed(root, key) for key in ("items", "users"))
    relations = {key: _relation(node) for key, node in _named(root.table("relations"))}
    past = {
        key: parse_past(key, node, tuple(relations), duration)
        for key, node in _named(root.table("past"))
    }
    _check_past(root, sessions, events, past, users, relations)
    tables: dict[str, Table | None] = {"events": events, "items": items, "users": users}
    groups = tuple(
        parse_group(key, node, tables, past) for key, node in _named(root.table("groups"))
    )
    names = tuple(group.name for group in groups)
    groups, experts = parse_experts(root.table("experts"), groups)
    words = root.table("words")
    schema = Schema(
        title,
        text,
        sessions,
        events,
        items,
        users,
        relations,
        past,
        groups,
        experts=experts,
        causes=_causes(_lists(root.table("causes"), names, "groups"), groups),
        sums=_lists(root.table("sums"), tuple(experts), "experts"),
        verbs=(words.get("false", str, "false"), words.get("true", str, "true")),
        header=words.optional("session", str) or "",
        said={k: words.table("names").get(k, str) for k in words.table("names").value},
    )
    words.finish()
    root.finish()
    _check_groups(root, schema)
    _check_words(root, schema)
    return schema


def duration(node: Node, key: str) -> int:
    """A duration such as ``"30 minutes"``, in ms; 0 where the key is missing."""
    text = node.optional(key, str)
    if text is None:
        return 0
    found = _DURATION.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise node.fail(
            f'expected {key} to be a duration such as "30 minutes" or "7 days", got {text!r}.', key
        )
    length = float(found[1]) * _UNITS[found[2]]
    if length > _LONGEST:
        raise node.fail(
            f"expected {key} to be at most {_LONGEST // _UNITS['day']:,} days, got {text!r}.", key
        )
    return max(round(length), 1)


def _named(node: Node) -> list[tuple[str, Node]]:
    found = list(node.tables())
    for key, _ in found:
        if not _NAME.fullmatch(key):
            raise node.fail(f"expected a name of letters, digits, _, + and -, got {key!r}.", key)
    return found


def _sessions(node: Node) -> Sessions:
    by = node.choice("by", ("file", "id", "inactivity"))
    column = "" if by == "inactivity" else node.get("column", str)
    gap = duration(node, "gap")
    if (by == "inactivity") != bool(gap):
        raise node.fail('expected a gap with by = "inactivity", and without it none.', "gap")
    shortest, longest = node.get("shortest", int), node.get("longest", int)
    if not 2 <= shortest <= longest <= _MOST:
        raise node.fail(
            f"expected 2 <= shortest <= longest <= {_MOST}, got {shortest} and {longest}.",
            "longest",
        )
    size = node.get("slice", int, 0)
    if size and not 2 <= size <= longest:
        raise node.fail(f"expected slice to be from 2 to longest ({longest}), got {size}.", "slice")
    split = node.choice("split", ("session", "user"), "session")
    node.finish()
    return Sessions(by, column, gap, shortest, longest, size, split)


def _columns(node: Node) -> tuple[Column, ...]:
    return tuple(_column(key, inner) for key, inner in node.table("columns").tables())


def _column(name: str, node: Node) -> Column:
    kind = node.choice("kind", KINDS)
    options: dict[str, Any] = {}
    if kind in ("integer", "number"):
        low, high = node.get("low", float), node.get("high", float)
        if not low <= high:
            raise node.fail(f"expected low <= high, got {low:g} and {high:g}.", "high")
        options = {"low": low, "high": high, "least": node.optional("least", float)}
        options["log"] = node.choice("log", ("", "x", "1p"), "")
        logit = node.get("logit", list, [])
        if logit:
            if len(logit) != 2 or not logit[0] < logit[1]:
                raise node.fail(f"expected logit to be [a, b] with a < b, got {logit}.", "logit")
            options["logit"] = (float(logit[0]), float(logit[1]))
        _check_transform(node, options)
    if kind == "name":
        names = node.names("names")
        if not 1 <= len(names) <= 256:
            raise node.fail(f"expected 1 to 256 names, got {len(names)}.", "names")
        options = {"names": names, "numbered": node.get("numbered", bool, False)}
    if kind == "time":
        options = {"unit": node.choice("unit", tuple(UNITS), "s")}
    node.finish()
    return Column(name, kind, **options)


def _check_transform(node: Node, options: dict[str, Any]) -> None:
    """Check that the transform of a number is defined from ``low`` to ``high``."""
    low, high, logit = options["low"], options["high"], options.get("logit")
    low = low if options["least"] is None else max(low, options["least"])
    if (options["log"] == "x" and low <= 0) or (options["log"] == "1p" and low <= -1):
        raise node.fail(f"expected values whose log exists, got low = {low:g}.", "log")
    if logit and not logit[0] < low <= high < logit[1]:
        raise node.fail(f"expected values between {logit}, got {low:g} to {high:g}.", "logit")


def _reference(node: Node, table: Table, key: str, kinds: tuple[str, ...]) -> str:
    """The name of a column of one of ``kinds``; empty where the key is missing."""
    name = node.optional(key, str)
    if name is None:
        return ""
    column = table.by_name.get(name)
    if column is None or column.kind not in kinds:
        known = [c.name for c in table.columns if c.kind in kinds]
        raise node.fail(
            f"expected {key} to be a column of kind {' or '.join(kinds)} ({', '.join(known)}), got "
            f"{name!r}.", key,
        )  # fmt: skip
    return name


def _events(node: Node, sessions: Sessions) -> Events:
    table = Table(node.get("files", str), _columns(node))
    wanted = {"user": ("id",), "item": ("id",), "time": ("time",), "label": ("flag",)}
    found = {key: _reference(node, table, key, kinds) for key, kinds in wanted.items()}
    needed = ("item", "label") if sessions.by == "file" else tuple(wanted)
    for key in needed:
        if not found[key]:
            raise node.fail(f"expected {key} in events, got {sorted(node.value)}.")
    if sessions.column and getattr(table.by_name.get(sessions.column), "kind", "") != "id":
        raise node.fail(f"expected a column {sessions.column} of kind id, the session's.")
    own = {c.name for c in table.columns}
    if sessions.by == "file":
        if missing := {"session_position", "session_length"} - own:
            raise node.fail(f"expected the columns {sorted(missing)}, got none.", "columns")
    elif taken := _TAKEN & {c.name for c in table.columns if c.kind != "id"}:
        raise node.fail(f"expected other names than {sorted(taken)}, which shards use.", "columns")
    node.finish()
    return Events(table.files, table.columns, "", **found)


def _keyed(root: Node, key: str) -> Table | None:
    node = root.table(key)
    if key not in root:
        return None
    table = Table(node.get("files", str), _columns(node))
    own = _reference(node, table, "key", ("id",))
    others = [c.name for c in table.columns if c.kind in ("id", "time", "date") and c.name != own]
    if not own or others:
        raise node.fail(f"expected key, and no other column of kind id, date or time: {others}.")
    node.finish()
    return Table(table.files, table.columns, own)


def _relation(node: Node) -> Relation:
    table = Table(node.get("files", str), _columns(node))
    found = {k: _reference(node, table, k, ("id",)) for k in ("user", "item")}
    for key, name in found.items():
        if not name:
            raise node.fail(f"expected {key} in a relation, got {sorted(node.value)}.")
    since = _reference(node, table, "since", ("time",))
    node.finish()
    return Relation(table.files, table.columns, "", **found, since=since)


def _lists(node: Node, known: tuple[str, ...], what: str) -> dict[str, tuple[str, ...]]:
    result = {}
    for key in node.value:
        result[key] = node.names(key)
        if unknown := [name for name in result[key] if name not in known]:
            raise node.fail(f"expected {what} out of {', '.join(known)}, got {unknown}.", key)
    return result


def _causes(
    causes: dict[str, tuple[str, ...]], groups: tuple[Group, ...]
) -> dict[str, frozenset[str]]:
    """The groups of each cause; of one that is two, that of half B, where the labels are."""
    whole = {group.name for group in groups}
    return {
        key: frozenset(name if name in whole else f"{name} in B" for name in of)
        for key, of in causes.items()
    }


def _check_past(
    root: Node,
    sessions: Sessions,
    events: Events,
    past: dict[str, Past],
    users: Table | None,
    relations: dict[str, Relation],
) -> None:
    own = {c.name for c in events.columns} | _TAKEN
    for name in past:
        if name in own:
            raise root.fail(f"expected another name than {name}, a column's.", "past", name)
    for name in relations:
        if name in _TABLES or not name.isidentifier():
            raise root.fail(f"expected another name than {name!r}.", "relations", name)
    if sessions.by != "file":
        return
    for name, given in (("past", past), ("users", users), ("relations", relations)):
        if given:
            raise root.fail(f'expected no {name} with by = "file": its rows carry no times.', name)
    if events.user or sessions.slice or sessions.split != "session":
        raise root.fail('expected no user, slice or split with by = "file".', "sessions")


def _check_groups(root: Node, schema: Schema) -> None:
    groups: tuple[Group, ...] = schema.groups
    if not groups:
        raise root.fail("expected groups, got none.", "groups")
    for columns in (schema.second_columns, schema.first_columns):
        if twice := sorted({name for name in columns if columns.count(name) > 1}):
            raise root.fail(f"expected each feature once, got {twice} more than once.", "groups")
    try:
        _ = schema.label_column
    except ValueError as error:
        raise root.fail(f"{error}; the baselines read it there.", "groups") from error
    of_second = [f for group in schema.of_half("B") for f in group.features]
    if any((f.table, f.source) == ("events", schema.events.label) for f in of_second):
        raise root.fail(
            f"expected the label {schema.events.label} in groups of half A alone, got it in half "
            "B, where it is to be predicted.", "groups",
        )  # fmt: skip
    if not schema.second_groups:
        raise root.fail('expected a group with halves = "AB" or "B", got none.', "groups")
    if sum(g.features[0].encoding == "embedding" for g in groups) > 1:
        raise root.fail("expected one embedding, got several.", "groups")
    try:
        family: SubsetFamily = schema.family
    except LayoutError as error:
        raise root.fail(f"{error}", "experts") from error
    if unused := [n for n in family.groups if not any(n in e for e in schema.experts.values())]:
        raise root.fail(f"expected every group in an expert, got {unused} in none.", "experts")


def _check_words(root: Node, schema: Schema) -> None:
    """Check that templates are such, and name columns that there are."""
    tables = (schema.events, schema.items, schema.users)
    known = {"run", *schema.past} | {c.name for t in tables if t for c in t.columns}
    places: list[tuple[str, tuple[str, ...]]] = [(schema.header, ("words", "session"))]
    places += [(group.words, ("groups", group.name, "words")) for group in schema.groups]
    for text, place in places:
        try:
            fields = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
        except ValueError as error:
            raise root.fail(f"expected a template, got {text!r}: {error}.", *place) from error
        if unknown := [name for name in fields if name not in known]:
            names = ", ".join(sorted(known))
            raise root.fail(f"expected fields out of {names}, got {unknown}.", *place)
