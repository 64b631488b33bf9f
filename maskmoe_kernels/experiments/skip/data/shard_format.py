"""The format of the shards: splits, row groups, columns, and checksums of their parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maskmoe_kernels.experiments.skip.data.arrays import Ints, UInt64s
from maskmoe_kernels.experiments.skip.data.columns import MSSD
from maskmoe_kernels.experiments.skip.data.ids import mix
from maskmoe_kernels.experiments.skip.schema.parse import parse_schema
from maskmoe_kernels.experiments.skip.schema.schema import Schema
from maskmoe_kernels.files import checksum

#: The splits hold 80, 10 and 10 % of the sessions; see :func:`split_of`.
SPLITS = ("train", "valid", "test")
#: Sessions of a row group, the unit of reading.
ROW_GROUP = 2048

_TYPES = {
    "flag": pa.bool_(), "name": pa.uint8(), "date": pa.date32(), "id": pa.string(),
    "time": pa.int64(), "number": pa.float32(),
}  # fmt: skip


def _integer_type(low: float, high: float) -> Any:
    if (low, high) == (0, 1):
        return pa.bool_()
    for bits, kind in ((8, pa.uint8()), (16, pa.uint16())):
        if low >= 0 and high < 2**bits:
            return kind
    return pa.int32()


@cache
def _shard_schema(text: str) -> Any:
    schema = parse_schema(text)
    place = pa.uint8() if schema.sessions.longest < 256 else pa.uint16()
    fields: dict[str, Any] = {}
    if schema.sessions.by != "file":
        fields = {"session_id": pa.string(), "session_position": place, "session_length": place}
        fields["user"] = pa.int32()
    for column in schema.events.columns:
        if column.name in ("session_position", "session_length"):
            fields[column.name] = place
        elif column.name == schema.events.item:
            fields["track"] = pa.int32()
        elif column.kind != "id":
            whole = column.kind == "integer"
            kind = _integer_type(column.low, column.high) if whole else _TYPES[column.kind]
            fields[column.name] = kind
        elif column.name == schema.sessions.column:
            fields["session_id"] = pa.string()
    return pa.schema(list((fields | dict.fromkeys(schema.past, pa.float32())).items()))


def shard_schema(schema: Schema) -> Any:
    """The columns of the shards of a schema, and their types.

    The columns of the events in their order, but ``track``, a row of the table of items, in place
    of the item's id. Sessions that are made from events have first ``session_id``,
    ``session_position``, ``session_length`` and ``user``, a row of the table of users, and last
    the features of the past.
    """
    return _shard_schema(schema.text)


#: The columns of the shards of the Music Streaming Sessions Dataset.
SCHEMA = shard_schema(MSSD)


def split_of(digest: UInt64s) -> Ints:
    """The split of each session, which depends on its id alone.

    Args:
        digest: Digests of the sessions' ids, ``(n,)``.
    Returns:
        Indices into ``SPLITS``, ``(n,)``.
    """
    tenth = mix(digest ^ np.uint64(0x5348415244)) % np.uint64(10)
    return np.maximum(tenth.astype(np.int64) - 7, 0)


def part_checksums(path: Path) -> list[list[int]]:
    """Where each part of a shard ends, and the CRC-32 of its bytes.

    The parts are the row groups and, last, the index of the file. With a checksum for each, a
    reader verifies only the parts that it reads.
    """
    metadata = pq.read_metadata(path)
    columns = [metadata.row_group(i).column(0) for i in range(metadata.num_row_groups)]
    begin = [c.dictionary_page_offset or c.data_page_offset for c in columns]
    # The index follows the pages of the last row group.
    index = path.stat().st_size - metadata.serialized_size - 8
    ends = [*begin[1:], index, path.stat().st_size]
    starts = [0, *ends[:-1]]
    return [[end, checksum(path, start, end)] for start, end in zip(starts, ends, strict=True)]


def is_part_intact(path: Path, parts: Sequence[Sequence[int]], i: int) -> bool:
    """Whether part ``i`` of a shard has the checksum that ``parts`` says.

    Args:
        path: The shard.
        parts: The :func:`part_checksums` of the shard when it was written.
        i: Index into ``parts``; -1 is the index of the file.
    """
    end, expected = parts[i]
    return checksum(path, parts[i - 1][0] if i else 0, end) == expected


def are_intact(shard: Callable[[str], Path], record: Mapping[str, Any]) -> bool:
    """Whether every split's shard is as ``record`` says that it was written.

    Args:
        shard: The shard of a split; one without sessions has no file.
        record: Has the size of each shard (``bytes``) and its ``parts``.
    """
    for split in SPLITS:
        path, parts = shard(split), record["parts"][split]
        if (path.stat().st_size if path.is_file() else 0) != record["bytes"][split]:
            return False
        if not all(is_part_intact(path, parts, i) for i in range(len(parts))):
            return False
    return True
