"""Joins the rows of a log file to sessions, and passes on the sessions that are whole and valid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from maskmoe_kernels.experiments.skip.data.arrays import Array, UInt64s
from maskmoe_kernels.experiments.skip.data.block import Block, Problems, line_message
from maskmoe_kernels.experiments.skip.data.columns import MSSD
from maskmoe_kernels.experiments.skip.data.ids import hash_ids
from maskmoe_kernels.experiments.skip.data.shard_format import shard_schema
from maskmoe_kernels.experiments.skip.schema.schema import Schema, Sessions


def block_table(block: Block, tracks: UInt64s, schema: Schema) -> Any:
    """The rows of a block in the types of the shards.

    Args:
        block: Rows of a log file.
        tracks: Digests of the known tracks' ids, ascending, ``(tracks,)``.
        schema: The schema.
    Returns:
        pyarrow table: the columns of the shards and ``line``, ``valid``, ``digest`` (of the
        session's id) and ``track_id``. Invalid rows hold 0, unknown tracks are -1.
    """
    valid = block.valid
    ids = block.values[schema.events.item]
    digest = hash_ids(ids)
    place = np.minimum(np.searchsorted(tracks, digest), len(tracks) - 1)
    values = dict(block.values)
    values["session_id"] = values[schema.sessions.column]
    values["track"] = np.where(tracks[place] == digest, place, -1)
    columns = {}
    for entry in shard_schema(schema):
        value = values[entry.name]
        if isinstance(value, np.ndarray):
            if pa.types.is_boolean(entry.type):
                value = value.astype(bool)
            # An invalid value may not fit the type. Its row is never written, so 0 takes its place.
            value = np.where(valid, value, 0) if value.dtype != bool else value
            kind = np.int32 if pa.types.is_date(entry.type) else entry.type.to_pandas_dtype()
            if entry.name in ("session_position", "session_length"):
                value = np.minimum(value, 2**entry.type.bit_width - 1)
            value = pa.array(value.astype(kind)).cast(entry.type)
        columns[entry.name] = value
    extra = {
        "line": pa.array(block.lines),
        "valid": pa.array(valid),
        "digest": pa.array(hash_ids(values["session_id"])),
        "track_id": ids,
    }
    return pa.table(columns | extra)


class SessionRows:
    """Joins rows to sessions across blocks; reports and drops sessions with a problem.

    Args:
        path: The log file, for messages.
        problems: Where problems are added.
        excluded: Digests of sessions that are dropped because other log files hold them.
        others: Names of those log files, for messages.
        schema: The schema.

    Attributes:
        lines: Digest of each session that was passed on -> line of its first row.
        dropped: Number of sessions that were dropped.
    """

    def __init__(
        self,
        path: Path,
        problems: Problems,
        excluded: UInt64s,
        others: Iterable[str],
        schema: Schema = MSSD,
    ):
        self.path, self.problems, self.schema = path, problems, schema
        self._columns = shard_schema(schema)
        self.lines: dict[int, int] = {}
        self.dropped = 0
        self._excluded = frozenset(excluded.tolist())
        self._others = ", ".join(others)
        self._rest: Any = None  # rows of the last session so far

    def add(self, table: Any) -> Any:
        """Take the rows of a block, and return those of the valid sessions that are complete.

        The last session is held back: the next block may continue it.

        Args:
            table: From :func:`block_table`.
        Returns:
            pyarrow table with the columns of the shards.
        """
        if self._rest is not None:
            table = pa.concat_tables([self._rest, table]).combine_chunks()
        starts = _starts(table)
        # Far more rows than a session may have: report them now instead of holding them back.
        end = (
            int(starts[-1])
            if len(table) - starts[-1] <= 4 * self.schema.sessions.longest
            else len(table)
        )
        self._rest = table.slice(end)
        return self._valid_rows(table.slice(0, end), last=False)

    def finish(self) -> Any:
        """The rows of the last session if it is valid; to be called at the end of the file."""
        if self._rest is None:
            return self._columns.empty_table()
        return self._valid_rows(self._rest, last=True)

    def _valid_rows(self, table: Any, last: bool) -> Any:
        if not len(table):
            return self._columns.empty_table()
        self._add_unknown_tracks(table)
        runs = _Runs(table, self.schema.sessions)
        # The problems of single rows are reported already: drop their sessions without another.
        keep = runs.all(runs.column["valid"] & (runs.column["track"] >= 0))
        for rule in runs.rules(last):
            self._add_problems(rule.kind, runs, keep & ~rule.holds, rule.expected, rule.got)
            keep &= rule.holds
        repeats = self._remember(runs, keep)
        is_repeat = np.isin(np.arange(len(keep)), list(repeats))
        self._add_problems(
            "duplicate session",
            runs,
            is_repeat,
            lambda s: "each session once, session",
            repeats.get,
        )
        keep &= ~is_repeat
        self.dropped += int((~keep).sum())
        return table.select(self._columns.names).filter(pa.array(np.repeat(keep, runs.count)))

    def _add_problems(
        self,
        kind: str,
        runs: _Runs,
        bad: Array,
        expected: Callable[[int], str],
        got: Callable[[int], object],
    ) -> None:
        """Report the sessions ``bad``, ``(runs,)`` bool; the last two take a session's index."""
        which = bad.nonzero()[0].tolist()
        lines = runs.column["line"][runs.starts]

        def describe(i: int) -> str:
            s = which[i]
            name = runs.table["session_id"][int(runs.starts[s])]
            words = f"{expected(s)} {name}", str(got(s)), "The session is left out."
            return line_message(self.path, int(lines[s]), *words)

        self.problems.add(kind, lines[which], describe)

    def _remember(self, runs: _Runs, keep: Array) -> dict[int, str]:
        """Note the sessions ``keep`` in ``lines``.

        Returns:
            Of the sessions that were passed on before or are excluded: index -> what was found,
            for the message.
        """
        digests = runs.column["digest"][runs.starts].tolist()
        lines = runs.column["line"][runs.starts].tolist()
        repeats: dict[int, str] = {}
        for s in keep.nonzero()[0].tolist():
            if digests[s] in self.lines:
                repeats[s] = f"the one of line {self.lines[digests[s]]} again"
            elif digests[s] in self._excluded:
                repeats[s] = f"one that {self._others} holds too"
            else:
                self.lines[digests[s]] = lines[s]
        return repeats

    @property
    def _files(self) -> str:
        return "" if self.schema.items is None else self.schema.items.files

    def _add_unknown_tracks(self, table: Any) -> None:
        unknown = table["valid"].to_numpy() & (table["track"].to_numpy() < 0)
        rows, lines = unknown.nonzero()[0], table["line"].to_numpy()
        self.problems.add(
            "unknown track",
            lines[rows],
            lambda i: line_message(
                self.path, int(lines[rows[i]]),
                f"a track of the {self._files}.csv files in column {self.schema.events.item}",
                repr(table["track_id"][int(rows[i])].as_py()), "Add the file that holds it.",
            ),
        )  # fmt: skip


class _Rule(NamedTuple):
    """What every session has to satisfy.

    Attributes:
        kind: Kind of problem where it does not.
        holds: Whether each session satisfies it, ``(runs,)`` bool.
        expected: Index of a session to what the rule demands of it, for the message.
        got: Index of a session to what it has instead.
    """

    kind: str
    holds: Array
    expected: Callable[[int], str]
    got: Callable[[int], object]


class _Runs:
    """Runs of consecutive rows with the same session id, each of which should be a session.

    Attributes:
        starts: First row of each run, ``(runs,)``.
        count: Rows of each run, ``(runs,)``.
        column: Name -> ``(rows,)``, of the columns that are checked.
    """

    def __init__(self, table: Any, sessions: Sessions):
        self.table, self.sessions = table, sessions
        self.starts = _starts(table)
        self.count = np.diff(self.starts, append=len(table))
        names = ("line", "valid", "digest", "track", "session_position", "session_length")
        self.column = {name: table[name].to_numpy() for name in names}

    def all(self, rows: Array) -> Array:
        """Whether ``rows``, ``(rows,)`` bool, is true in every row of a run, ``(runs,)`` bool."""
        result: Array = np.logical_and.reduceat(rows, self.starts)
        return result

    def rules(self, last: bool) -> Iterator[_Rule]:
        """The rules, in the order in which they are to be checked.

        Args:
            last: Whether the file ends with the last run.
        """
        count, length = self.count, self.column["session_length"]
        position = self.column["session_position"]
        shortest, longest = self.sessions.shortest, self.sessions.longest
        declared = length[self.starts].astype(np.int64)
        row = np.arange(len(position)) - np.repeat(self.starts, count)

        def of(s: int) -> slice:
            return slice(self.starts[s], self.starts[s] + min(count[s], longest + 5))

        def rows(s: int) -> str:
            return f"{declared[s]} rows (session_length) of session"

        yield _Rule(
            "lengths disagree", self.all(length == np.repeat(declared, count)),
            lambda s: "one session_length for session", lambda s: np.unique(length[of(s)]).tolist(),
        )  # fmt: skip
        if last:
            yield _Rule(
                "cut session", count >= declared, rows,
                lambda s: f"{count[s]} at the end of the file, which is cut short",
            )  # fmt: skip
        yield _Rule(
            "positions", self.all(position == row + 1),
            lambda s: f"positions 1 to {declared[s]}, each once and in order, of session",
            lambda s: position[of(s)].tolist(),
        )  # fmt: skip
        yield _Rule("length", count == declared, rows, lambda s: count[s])
        yield _Rule(
            "session size", (count >= shortest) & (count <= longest),
            lambda s: f"{shortest} to {longest} tracks in session", lambda s: count[s],
        )  # fmt: skip


def _starts(table: Any) -> Array:
    """First row of each run of equal digests."""
    digest = table["digest"].to_numpy()
    return np.concatenate([[0], (digest[1:] != digest[:-1]).nonzero()[0] + 1])
