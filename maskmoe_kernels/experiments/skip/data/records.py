"""The folder that ``prepare`` writes: names, records of finished steps, and checksums of files.

::

    manifest.json           written last: format, digests, statistics of the tracks, and per split
                            the shards with the number of sessions of each row group
    users/                  the table of users, if the schema has users; as that of the tracks
    tracks/                 the table of tracks, see :mod:`.tracks`
    train/ valid/ test/     one shard per log file; a row group holds whole sessions
    logs/                   one record per log file, written when the file is converted

A file whose name starts with ``.unfinished-`` is left by a killed run; the next run removes it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.report import read_json, sealed, write_json
from maskmoe_kernels.experiments.skip.data.arrays import Array
from maskmoe_kernels.experiments.skip.data.block import Problems
from maskmoe_kernels.files import checksum, replacing

#: Version of everything that ``prepare`` writes. Files of another version are made again.
FORMAT = 3
MANIFEST = "manifest.json"
TRACKS_FOLDER, LOGS_FOLDER, USERS_FOLDER = "tracks", "logs", "users"


def fingerprint(path: Path) -> dict[str, Any]:
    """Name, size and time of a source file; if they are the same, the file was not changed.

    Raises:
        DataError: There is no such file.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: expected a readable file, got {error.strerror}.") from error
    return {"name": path.name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of a finished step; None if it is missing, damaged or of another format."""
    try:
        content = read_json(path, "")
    except DataError:
        return None
    content.pop("checksum", None)  # verified, and no part of what the step found
    return content if content.get("format") == FORMAT else None


class Step(ABC):
    """A step of ``prepare`` that a later run keeps: its record, written last, vouches for it.

    Attributes:
        strict: Stop at the first problem.
    """

    strict: bool

    @property
    @abstractmethod
    def record(self) -> Path:
        """The record."""

    @abstractmethod
    def made_from(self) -> dict[str, Any]:
        """All that the results depend on, in plain values."""

    @abstractmethod
    def is_whole(self, record: Mapping[str, Any]) -> bool:
        """Whether the files are as ``record`` says."""

    def valid_record(self) -> dict[str, Any] | None:
        """The record of an earlier run; None if the step must be done (again)."""
        record = read_record(self.record)
        if record is None or record.get("from") != self.made_from():
            return None
        if self.strict and record["problems"]["counts"]:
            return None
        return record if self.is_whole(record) else None

    def start(self) -> dict[str, Any]:
        """Remove the record, and return what the step is :meth:`made_from` as it begins."""
        made_from = self.made_from()
        self.record.unlink(missing_ok=True)
        return made_from

    def finish(
        self, made_from: dict[str, Any], problems: Problems, **content: Any
    ) -> dict[str, Any]:
        """Write the record, and return it.

        Args:
            made_from: What :meth:`start` returned.
            problems: What was found in the files.
            content: What else the record says.
        """
        found = {"counts": problems.counts, "examples": problems.examples}
        record = {"format": FORMAT, "from": made_from, **content, "problems": found}
        write_json(self.record, sealed(record))
        return record


def size_and_checksum(path: Path) -> dict[str, int]:
    """Size and CRC-32 of a file.

    Raises:
        OSError: It cannot be read.
    """
    return {"bytes": path.stat().st_size, "crc32": checksum(path)}


def is_intact(path: Path, expected: Mapping[str, int]) -> bool:
    """Whether there is a file whose :func:`size_and_checksum` is ``expected``.

    Raises:
        OSError: It cannot be read.
    """
    return path.is_file() and size_and_checksum(path) == expected


def save_array(path: Path, array: Array) -> None:
    """Write a ``.npy`` file, with the guarantees of :func:`replacing`."""
    with replacing(path) as file:
        np.save(file, array)
