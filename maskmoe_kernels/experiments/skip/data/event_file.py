"""Checks one file of events or pairs, and writes its valid rows with digests in place of ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maskmoe_kernels.experiments.skip.data.arrays import Array
from maskmoe_kernels.experiments.skip.data.arrow_file import open_table
from maskmoe_kernels.experiments.skip.data.block import Block, Problems, line_message
from maskmoe_kernels.experiments.skip.data.ids import hash_ids
from maskmoe_kernels.experiments.skip.data.packed import stem
from maskmoe_kernels.experiments.skip.data.records import (
    TRACKS_FOLDER,
    USERS_FOLDER,
    Step,
    fingerprint,
    is_intact,
    size_and_checksum,
)
from maskmoe_kernels.experiments.skip.data.tracks import DIGESTS
from maskmoe_kernels.experiments.skip.schema.schema import Events, Relation, Schema
from maskmoe_kernels.files import replacing

#: The folder of the checked rows in the folder of the shards.
CHECKED_FOLDER = "checked"


@dataclass(frozen=True)
class EventFile(Step):
    """A file to check.

    Attributes:
        source: The file.
        number: Its place among the files of its table; it orders rows of one user and time.
        out: Folder of the shards.
        table: ``"events"``, or the name of a relation.
        schema: The schema.
        tables: Folder -> digest of the tables in ``out`` that were given.
        strict: Stop at the first problem.
    """

    source: Path
    number: int
    out: Path
    table: str
    schema: Schema
    tables: dict[str, str]
    strict: bool = False

    @property
    def declared(self) -> Events | Relation:
        """The table that it is of."""
        if self.table == "events":
            return self.schema.events
        return self.schema.relations[self.table]

    @property
    def target(self) -> Path:
        """Where its valid rows go."""
        return self.out / CHECKED_FOLDER / f"{self.table}-{stem(self.source)}.parquet"

    @property
    def record(self) -> Path:
        """The record, which is written last."""
        return self.target.with_suffix(".json")

    def made_from(self) -> dict[str, Any]:
        """All that the checked rows depend on."""
        own = {"source": fingerprint(self.source), "number": self.number, "tables": self.tables}
        return own | {"table": repr(self.declared), "sessions": repr(self.schema.sessions)}

    def is_whole(self, record: Mapping[str, Any]) -> bool:
        """Whether the checked rows are as ``record`` says."""
        return is_intact(self.target, record["file"])


def check_file(
    file: EventFile, advance: Callable[[int], None] = lambda count: None
) -> dict[str, Any]:
    """Check a file, unless an earlier run did; rows with a problem are left out.

    Args:
        file: The file.
        advance: Called with the number of bytes just read.
    Returns:
        The record, as it is written to ``file.record``.
    Raises:
        DataError: The file cannot be read or lacks a column, or ``file.strict`` and there is a
            problem.
    """
    done = file.valid_record()
    if done is not None:
        return done
    made_from = file.start()
    known = {
        name: np.load(file.out / folder / DIGESTS, mmap_mode="r")
        for name, folder in (("item", TRACKS_FOLDER), ("user", USERS_FOLDER))
        if folder in file.tables
    }
    table = open_table(file.source, file.declared.columns, advance)
    rows = 0
    with replacing(file.target) as target:
        writer: Any = None
        try:
            for block in table.blocks():
                table.problems.raise_first(file.strict)
                checked = _checked(file, block, known, table.problems)
                table.problems.raise_first(file.strict)
                if writer is None:
                    writer = pq.ParquetWriter(target, checked.schema, compression="zstd")
                writer.write_table(checked)
                rows += len(checked)
            table.problems.raise_first(file.strict)
        finally:
            if writer is not None:
                writer.close()
    written = size_and_checksum(file.target)
    return file.finish(made_from, table.problems, digest=table.digest, rows=rows, file=written)


def _checked(file: EventFile, block: Block, known: dict[str, Array], problems: Problems) -> Any:
    """The valid rows of a block: digests of user and item, time, and the other columns."""
    declared = file.declared
    valid = block.valid
    columns: dict[str, Any] = {}
    for name, key in (("user", declared.user), ("item", declared.item)):
        ids = block.values[key]
        columns[name] = hash_ids(ids.fill_null(""))
        if name in known:
            place = np.searchsorted(known[name], columns[name])
            place = np.minimum(place, max(len(known[name]) - 1, 0))
            valid = valid & _are_known(file, block, key, known[name][place] == columns[name], valid,
                                       problems)  # fmt: skip
        else:
            columns[f"{name}_id"] = ids
    if isinstance(declared, Relation):
        since = np.zeros(len(valid), np.int64)
        columns["since"] = block.values[declared.since] if declared.since else since
    else:
        own = (declared.user, declared.item)
        names = [c.name for c in declared.columns if c.name not in own]
        kept = [n for n in names if declared.by_name[n].kind != "id"]
        if file.schema.sessions.column:
            columns["session"] = block.values[file.schema.sessions.column]
        columns |= {f"event_{name}": block.values[name] for name in kept}
    columns["source"] = np.full(len(valid), file.number, np.int32)
    columns["line"] = block.lines
    return pa.table(columns).filter(pa.array(valid))


def _are_known(
    file: EventFile, block: Block, key: str, found: Array, valid: Array, problems: Problems
) -> Array:
    """``found``, after the ids that are not are reported."""
    rows = (valid & ~found).nonzero()[0]
    kind = "item" if key == file.declared.item else "user"
    table = file.schema.items if kind == "item" else file.schema.users
    files = "" if table is None else table.files
    wanted = f"an id in column {key} that the files {files} hold"
    problems.add(
        f"unknown {kind}",
        block.lines[rows],
        lambda i: line_message(
            file.source, int(block.lines[rows[i]]), wanted,
            repr(block.values[key][int(rows[i])].as_py()), "Add the file that holds it.",
        ),
    )  # fmt: skip
    return found
