"""The schema of a log of sessions, as its TOML file declares it; see :func:`parse.read_schema`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from maskmoe_kernels.experiments.skip.schema.column import Column
from maskmoe_kernels.layout.subsets import SubsetFamily

#: Sources of features that every shard has: place in the session and in its slice, from 1.
PLACES = ("session_position", "session_length", "place")
#: How a value becomes columns.
ENCODINGS = ("value", "one_hot", "circle", "weekday", "weekend", "embedding")


@dataclass(frozen=True)
class Table:
    """A table of the data.

    Attributes:
        files: Pattern of the names of its files, without their endings.
        columns: Its columns, keys included.
        key: The column of the id of its rows; of the events there is none.
    """

    files: str
    columns: tuple[Column, ...]
    key: str = ""

    @cached_property
    def by_name(self) -> dict[str, Column]:
        """Column by name."""
        return {column.name: column for column in self.columns}

    @cached_property
    def features(self) -> dict[str, tuple[str, ...]]:
        """Column -> names of its columns in the matrix of features of an items or users table."""
        return {
            c.name: tuple(f"{c.name}_{n}" for n in c.names) if c.one_hot else (c.name,)
            for c in self.columns
            if c.kind != "id"
        }

    @cached_property
    def places(self) -> dict[str, slice]:
        """Column -> its place in that matrix."""
        places, start = {}, 0
        for name, columns in self.features.items():
            places[name] = slice(start, start + len(columns))
            start += len(columns)
        return places


@dataclass(frozen=True)
class Events(Table):
    """The table with a row per event.

    Attributes:
        user: Column of the user's id; empty where the log has none.
        item: Column of the item's id.
        time: Column of the time; empty where the rows of a file are in order.
        label: The flag to predict in half B.
    """

    user: str = ""
    item: str = ""
    time: str = ""
    label: str = ""


@dataclass(frozen=True)
class Relation(Table):
    """A table of pairs of users and items.

    Attributes:
        user: Column of the user's id.
        item: Column of the item's id.
        since: Column of the time from which on a pair is related; empty: always.
    """

    user: str = ""
    item: str = ""
    since: str = ""


@dataclass(frozen=True)
class Sessions:
    """How events become sessions.

    Attributes:
        by: ``"file"``: rows of a session follow one another in a file, with their positions;
            ``"id"``: rows of one user with one id, by time; ``"inactivity"``: a user's rows
            without a longer pause than ``gap``.
        column: The column of the session's id; empty with ``"inactivity"``.
        gap: The pause, in ms.
        shortest: Fewest events of a session; shorter ones are left out.
        longest: Most events of a session; longer ones are left out.
        slice: Events of the slice that is drawn from a session; 0: the whole session.
        split: ``"session"`` or ``"user"``: whose id decides between train, valid and test.
    """

    by: str
    column: str
    gap: int
    shortest: int
    longest: int
    slice: int = 0
    split: str = "session"

    @property
    def size(self) -> int:
        """Most events that a model sees of a session."""
        return self.slice or self.longest

    @property
    def half(self) -> int:
        """Events of a half, padding included."""
        return -(-self.size // 2)


@dataclass(frozen=True)
class Past:
    """A feature of the events strictly before the session.

    Attributes:
        name: Its name.
        kind: ``"rate"``: (labels + 1/2) / (events + 1); ``"discounted_rate"``: the same, where an
            event of age t counts 2^(-t / half_life); ``"count"``: log(1 + events);
            ``"relation"``: 1 where the pair is in a relation since before the session.
        of: Whose events: ``"user"``, ``"item"`` or ``"pair"`` (the user's of the item).
        half_life: In ms.
        window: Only events of this age, in ms; 0: of any.
        relation: Name of the relation.
    """

    name: str
    kind: str
    of: str = ""
    half_life: int = 0
    window: int = 0
    relation: str = ""


@dataclass(frozen=True)
class Feature:
    """One value and the columns that it becomes.

    Attributes:
        table: ``"events"``, ``"items"``, ``"users"`` or ``"past"``.
        source: Name of the value in its table.
        encoding: One of ``ENCODINGS``.
        columns: Names of the columns.
        log: Whether log(1 + x) replaces the value.
        divide: What the value is divided by, after that.
        subtract: What is subtracted from it, at last.
        period: Of ``"circle"``: the value from which on it repeats.
        names: Of ``"one_hot"``: the names with a column of their own; others share the last one.
    """

    table: str
    source: str
    encoding: str
    columns: tuple[str, ...]
    log: bool = False
    divide: float = 1.0
    subtract: float = 0.0
    period: int = 0
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """A group of features.

    Attributes:
        name: Its name.
        halves: The halves it exists in, ``"A"``, ``"B"`` or ``"AB"``.
        features: Its features in order.
        words: How an explanation says what is in it; empty: names and values.
    """

    name: str
    halves: str
    features: tuple[Feature, ...]
    words: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of its columns."""
        return tuple(column for feature in self.features for column in feature.columns)


@dataclass(frozen=True)
class Schema:
    """A schema.

    Attributes:
        name: Its name.
        text: The TOML text.
        sessions: How events become sessions.
        events: The table of events.
        items: The table of items; ``None``: the items of the events.
        users: The table of users; ``None``: the users of the events.
        relations: Name -> relation.
        past: Name -> feature of the past.
        groups: The groups, in the order of the columns of both halves. One that an expert sees in
            one of its halves alone is two, ``"NAME in A"`` and ``"NAME in B"``.
        experts: Expert -> names of its groups, each seen where it exists.
        causes: Cause of generated labels -> groups that an expert must see to know it.
        sums: Name -> experts whose shares a figure adds up.
        verbs: What is said of a label that is false, and of one that is true.
        header: How an explanation describes a session; empty: not at all. Templates as in
            :mod:`..words`.
        said: Names of columns of the kind name -> how an explanation calls them.
    """

    name: str
    text: str
    sessions: Sessions
    events: Events
    items: Table | None
    users: Table | None
    relations: Mapping[str, Relation]
    past: Mapping[str, Past]
    groups: tuple[Group, ...]
    experts: Mapping[str, tuple[str, ...]]
    causes: Mapping[str, frozenset[str]]
    sums: Mapping[str, tuple[str, ...]]
    verbs: tuple[str, str]
    header: str = ""
    said: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def data(self) -> str:
        """A digest of what decides the rows of the shards: all but groups, experts and words."""
        parts = self.sessions, self.events, self.items, self.users, self.relations, self.past
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @cached_property
    def family(self) -> SubsetFamily:
        """Subsets of the groups, one expert each."""
        groups = {group.name: len(group.columns) for group in self.groups}
        return SubsetFamily(groups, {n: list(of) for n, of in self.experts.items()})

    def of_half(self, half: str) -> tuple[Group, ...]:
        """The groups of half ``"A"`` or ``"B"``, in the order of its columns."""
        return tuple(group for group in self.groups if half in group.halves)

    @cached_property
    def first_groups(self) -> dict[str, int]:
        """Groups of half A and their widths."""
        return {group.name: len(group.columns) for group in self.of_half("A")}

    @cached_property
    def second_groups(self) -> dict[str, int]:
        """Groups of half B and their widths."""
        return {group.name: len(group.columns) for group in self.of_half("B")}

    @cached_property
    def first_columns(self) -> tuple[str, ...]:
        """Names of the columns of half A."""
        return tuple(name for group in self.of_half("A") for name in group.columns)

    @cached_property
    def second_columns(self) -> tuple[str, ...]:
        """Names of the columns of half B."""
        return tuple(name for group in self.of_half("B") for name in group.columns)

    @cached_property
    def label_column(self) -> int:
        """The column of half A that holds the label; the baselines read it."""
        position = 0
        for feature in (f for group in self.of_half("A") for f in group.features):
            if feature.table == "events" and feature.source == self.events.label:
                return position
            position += len(feature.columns)
        raise ValueError(f"no group of half A holds the label {self.events.label!r}")

    @cached_property
    def embedding(self) -> tuple[str, int] | None:
        """The group that is an embedding of the user and its width; ``None``: there is none."""
        for group in self.groups:
            if group.features[0].encoding == "embedding":
                return group.name, len(group.columns)
        return None
