"""Reads the shards of one split; every part is verified before it is used."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.report import check_seal, read_json
from maskmoe_kernels.experiments.shared.structure import Spec, check
from maskmoe_kernels.experiments.skip.data.arrays import Array
from maskmoe_kernels.experiments.skip.data.features import (
    Rows,
    SessionBatch,
    assemble,
    read_columns,
)
from maskmoe_kernels.experiments.skip.data.records import (
    FORMAT,
    LOGS_FOLDER,
    MANIFEST,
    TRACKS_FOLDER,
    USERS_FOLDER,
    is_intact,
)
from maskmoe_kernels.experiments.skip.data.shard_format import SPLITS, is_part_intact
from maskmoe_kernels.experiments.skip.data.tracks import FEATURES, KNOWN, TRACKS
from maskmoe_kernels.experiments.skip.schema.parse import parse_schema

_REMEDY = "Run `maskmoe skip prepare` again with --resume: it makes what is missing or damaged."
_SPEC: Spec = {
    "digest": str,
    "schema": str,
    "splits": {str: [{"file": str, "bytes": int, "row_groups": [int]}]},
    "parts": {str: [[int]]},
    "files": {str: {str: {"bytes": int, "crc32": int}}},
    "checksum": str,
}


class Shards:
    """The shards of one split, as ``prepare`` wrote them.

    Args:
        folder: Where ``prepare`` wrote.
        split: ``train``, ``valid`` or ``test``.

    Attributes:
        schema: The schema of the sessions.
        digest: Digest of the sessions and tracks of all splits.
        sizes: Sessions of each row group, in file order.

    Raises:
        DataError: There is no manifest, it is damaged or of another format, or a shard does not
            have the size that it says.
        ValueError: ``split`` is not one of the three.
    """

    def __init__(self, folder: str | Path, split: str):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {list(SPLITS)}, got {split!r}")
        self.folder, self.split = Path(folder), split
        manifest = _read_manifest(self.folder)
        self.digest: str = manifest["digest"]
        self.schema = parse_schema(manifest["schema"], f"{self.folder / MANIFEST} (its schema)")
        self._shards = manifest["splits"][split]
        for shard in self._shards:
            path = self.folder / shard["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                got = "no such file" if size is None else f"{size} bytes"
                raise DataError(f"{path}: expected {shard['bytes']} bytes, got {got}. {_REMEDY}")
        self._parts: dict[str, list[list[int]]] = manifest["parts"]
        self._files: dict[str, dict[str, dict[str, int]]] = manifest["files"]
        self._verified: set[str] = set()  # shards whose index is verified
        self.sizes: list[int] = [n for shard in self._shards for n in shard["row_groups"]]
        self._places = [
            (shard["file"], i) for shard in self._shards for i in range(len(shard["row_groups"]))
        ]

    def __len__(self) -> int:
        """Number of sessions."""
        return sum(self.sizes)

    @cached_property
    def tracks(self) -> Array:
        """Normalised features of all tracks, ``(tracks, columns)`` float32, memory-mapped.

        Raises:
            DataError: The file is missing or damaged.
        """
        return self._matrix(TRACKS_FOLDER, FEATURES)

    @cached_property
    def users(self) -> tuple[Array, Array] | None:
        """Features of all users, ``(users, columns)`` float32, memory-mapped, and whether they
        have sessions in training, ``(users,)`` bool; ``None`` without users.

        Raises:
            DataError: A file is missing or damaged.
        """
        if not self.schema.events.user:
            return None
        return self._matrix(USERS_FOLDER, FEATURES), self._matrix(USERS_FOLDER, KNOWN)

    @property
    def embedded(self) -> int:
        """Rows of the table of embeddings: the users, and one for all unknown ones."""
        return 1 + (0 if self.users is None else len(self.users[1]))

    def _matrix(self, folder: str, name: str) -> Array:
        path = self._table_file(folder, name)
        try:
            matrix: Array = np.load(path, mmap_mode="r")
        except ValueError as error:
            raise DataError(f"{path}: expected a matrix, got {error}. {_REMEDY}") from error
        return matrix

    def _table_file(self, folder: str, name: str) -> Path:
        """The path of a file of the tracks or users, after its checksum is verified."""
        path = self.folder / folder / name
        try:
            intact = is_intact(path, self._files[folder][name])
        except OSError as error:
            raise DataError(f"{path}: expected a file, got {error.strerror}. {_REMEDY}") from error
        except KeyError as error:
            raise DataError(f"{path}: expected an entry in {MANIFEST}. {_REMEDY}") from error
        if not intact:
            raise DataError(f"{path}: expected what `prepare` wrote, got another file. {_REMEDY}")
        return path

    def table(self, group: int, columns: tuple[str, ...] | None = ()) -> Any:
        """The rows of one row group.

        Args:
            group: Index into ``sizes``.
            columns: Names of the columns to read; none: those that :class:`Rows` reads;
                ``None``: all.
        Returns:
            pyarrow table.
        Raises:
            DataError: The shard is damaged.
        """
        name, place = self._places[group]
        path = self.folder / name
        wanted = None if columns is None else list(columns or read_columns(self.schema))
        try:
            if name not in self._verified:
                self._verify(name, -1)
                self._verified.add(name)
            self._verify(name, place)
            with pq.ParquetFile(path) as file:
                return file.read_row_group(place, columns=wanted, use_threads=False)
        except (OSError, ValueError, IndexError, KeyError, pa.ArrowException) as error:
            raise DataError(f"{path}: expected a whole shard, got {error}. {_REMEDY}") from error

    def _verify(self, name: str, part: int) -> None:
        """Verify the checksum of a row group, or with -1 of the index at the end of the file."""
        if not is_part_intact(self.folder / name, self._parts[name], part):
            raise ValueError(f"other bytes than those written, in part {part}")

    def find(self, session_id: str) -> tuple[SessionBatch, Any]:
        """Find one session.

        Returns:
            A batch of this session alone, and a pyarrow table of its rows (of its slice) with the
            raw features of their tracks and users.
        Raises:
            DataError: The split does not hold the session, or a file is damaged.
        """
        for group in range(len(self.sizes)):
            ids = self.table(group, ("session_id",))["session_id"]
            if not pc.any(pc.equal(ids, session_id)).as_py():
                continue
            table = self.table(group, None)
            table = table.filter(pc.equal(table["session_id"], session_id)).combine_chunks()
            rows = Rows.decode(table, self.schema)
            batch = assemble(rows, np.arange(1), self.tracks, self.users)
            begin = 0 if batch.offset is None else int(batch.offset)
            table = table.slice(begin, self.schema.sessions.size)
            for folder, key in ((TRACKS_FOLDER, "track"), (USERS_FOLDER, "user")):
                if key in table.column_names:
                    raw = pq.read_table(self._table_file(folder, TRACKS)).take(table[key])
                    for name in raw.column_names:
                        table = table.append_column(name, raw[name])
            return batch, table
        raise DataError(
            f"session {session_id!r} is not among the {len(self)} sessions of {self.split} in "
            f"{self.folder}. Name another, or another split."
        )


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        text = f"{path}: expected the manifest of prepared shards, got No such file. "
        if any((folder / name).is_dir() for name in (TRACKS_FOLDER, LOGS_FOLDER)):
            raise DataError(
                f"{text}`maskmoe skip prepare` did not finish in this folder. Run it again with "
                "--resume: it goes on where it was."
            )
        raise DataError(f"{text}Run `maskmoe skip prepare` first, or name its folder.")
    # Check the format first: another format may compute its checksum in another way.
    manifest = read_json(path, _REMEDY, seal=False)
    if manifest.get("format") != FORMAT:
        got = manifest.get("format")
        raise DataError(f"{path}: expected format {FORMAT}, got {got}. {_REMEDY}")
    check_seal(manifest, path, _REMEDY)
    check(manifest, _SPEC, lambda what: DataError(f"{path}: {what}. {_REMEDY}"))
    return manifest
