"""The format of the shards: splits, row groups, columns, and checksums of their parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maskmoe_kernels.experiments.skip.data.arrays import Ints, UInt64s
from maskmoe_kernels.experiments.skip.data.columns import LOG_COLUMNS
from maskmoe_kernels.experiments.skip.data.ids import mix
from maskmoe_kernels.files import checksum

#: The splits hold 80, 10 and 10 % of the sessions; see :func:`split_of`.
SPLITS = ("train", "valid", "test")
#: Sessions of a row group, the unit of reading.
ROW_GROUP = 2048

_SMALL = {"session_position": pa.uint8(), "session_length": pa.uint8(), "hour_of_day": pa.uint8()}
_TYPES = {"flag": pa.bool_(), "name": pa.uint8(), "date": pa.date32(), "id": pa.string()}


def _shard_type(name: str, kind: str, high: float) -> Any:
    if kind != "integer":
        return _TYPES[kind]
    return _SMALL.get(name) or (pa.bool_() if high == 1 else pa.uint16())


#: The official log columns in their order, but ``track``, a row of the table of tracks, in place
#: of the track's id.
SCHEMA = pa.schema(
    [
        ("track", pa.int32())
        if column.name == "track_id_clean"
        else (column.name, _shard_type(column.name, column.kind, column.high))
        for column in LOG_COLUMNS
    ]
)


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
