"""Sessions streamed from the shards: batches of half-sessions, each session once an epoch.

Which sessions make batch k of an epoch depends on the shards, the seed, the epoch, ``batch_size``
and ``pool`` alone (:mod:`.schedule`). Ranks divide each batch, and workers a rank's share, so the
shares of all ranks, one after the other, are bit for bit the batch of a single process.

The cursor counts the batches that :class:`SessionLoader` handed out. What workers have fetched
ahead does not count; after ``load_state_dict`` they start at the batch that comes next.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.report import check_seal, read_json
from maskmoe_kernels.experiments.shared.structure import Spec, check
from maskmoe_kernels.experiments.skip.data.mssd_columns import TRACK_FEATURES
from maskmoe_kernels.experiments.skip.data.mssd_shards import SPLITS, is_part_whole
from maskmoe_kernels.experiments.skip.data.mssd_tracks import FOLDER, FORMAT, is_whole
from maskmoe_kernels.experiments.skip.data.schedule import Pool, Schedule
from maskmoe_kernels.experiments.skip.data.session_features import (
    READ,
    Array,
    Rows,
    SessionBatch,
    assemble,
)

_REMEDY = "Run `maskmoe skip prepare` again."
_MANIFEST: Spec = {
    "digest": str,
    "splits": {str: [{"file": str, "bytes": int, "row_groups": [int]}]},
    "parts": {str: [[int]]},
    "files": {str: {"bytes": int, "crc32": int}},
    "checksum": str,
}


class Shards:
    """The shards of one split, as ``prepare`` wrote them.

    Args:
        folder: Where ``prepare`` wrote.
        split: ``train``, ``valid`` or ``test``.
    Raises:
        DataError: There is no manifest, it is of another format, or a shard is not as it says.
        ValueError: Another split.
    """

    def __init__(self, folder: str | Path, split: str):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {list(SPLITS)}, got {split!r}")
        self.folder, self.split = Path(folder), split
        manifest = _manifest(self.folder)
        self.digest: str = manifest["digest"]
        self._shards = manifest["splits"][split]
        for shard in self._shards:
            path = self.folder / shard["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                got = "no such file" if size is None else f"{size} bytes"
                raise DataError(f"{path}: expected {shard['bytes']} bytes, got {got}. {_REMEDY}")
        self._parts: dict[str, list[list[int]]] = manifest["parts"]
        self._files: dict[str, dict[str, int]] = manifest["files"]
        self._known: set[str] = set()  # files whose index is verified
        self.sizes: list[int] = [n for shard in self._shards for n in shard["row_groups"]]
        self._places = [
            (shard["file"], i) for shard in self._shards for i in range(len(shard["row_groups"]))
        ]

    def __len__(self) -> int:
        """Number of sessions."""
        return sum(self.sizes)

    @cached_property
    def tracks(self) -> Array:
        """Normalised features of all tracks, ``(tracks, 29)`` float32, mapped into memory."""
        path = self._track_file("features.npy")
        try:
            matrix: Array = np.load(path, mmap_mode="r")
        except ValueError as error:
            raise DataError(f"{path}: expected a matrix, got {error}. {_REMEDY}") from error
        return matrix

    def _track_file(self, name: str) -> Path:
        """A file of the tracks, once its checksum is verified."""
        path = self.folder / FOLDER / name
        try:
            whole = is_whole(path, self._files[name])
        except OSError as error:
            raise DataError(f"{path}: expected a file, got {error.strerror}. {_REMEDY}") from error
        if not whole:
            raise DataError(f"{path}: expected what `prepare` wrote, got another file. {_REMEDY}")
        return path

    def table(self, group: int, columns: tuple[str, ...] | None = READ) -> Any:
        """The rows of one row group, a pyarrow table."""
        name, place = self._places[group]
        path, wanted = self.folder / name, None if columns is None else list(columns)
        try:
            if name not in self._known:
                self._verify(name, -1)
                self._known.add(name)
            self._verify(name, place)
            with pq.ParquetFile(path) as file:
                return file.read_row_group(place, columns=wanted, use_threads=False)
        except (OSError, ValueError, IndexError, KeyError, pa.ArrowException) as error:
            raise DataError(f"{path}: expected a whole shard, got {error}. {_REMEDY}") from error

    def _verify(self, name: str, part: int) -> None:
        """Hold a part of a shard against its checksum: a row group, or the index at the end."""
        if not is_part_whole(self.folder / name, self._parts[name], part):
            raise ValueError(f"other bytes than those written, in part {part}")

    def find(self, session_id: str) -> tuple[SessionBatch, Any]:
        """One session: a batch of it alone, and its rows with the raw features of its tracks.

        Raises:
            DataError: This split does not hold it.
        """
        for group in range(len(self.sizes)):
            ids = self.table(group, ("session_id",))["session_id"]
            if not pc.any(pc.equal(ids, session_id)).as_py():
                continue
            table = self.table(group, None)
            table = table.filter(pc.equal(table["session_id"], session_id)).combine_chunks()
            batch = assemble(Rows.decode(table), np.arange(1), self.tracks)
            raw = pq.read_table(self._track_file("tracks.parquet")).take(table["track"])
            for name in ("track_id", *TRACK_FEATURES):
                table = table.append_column(name, raw[name])
            return batch, table
        raise DataError(
            f"session {session_id!r} is not among the {len(self)} sessions of {self.split} in "
            f"{self.folder}. Name another, or another split."
        )


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        raise DataError(
            f"{path}: expected the manifest of prepared shards, got No such file. {_REMEDY}"
        )
    # The format first: another one may be sealed in another way.
    manifest = read_json(path, _REMEDY, seal=False)
    if manifest.get("format") != FORMAT:
        got = manifest.get("format")
        raise DataError(f"{path}: expected format {FORMAT}, got {got}. {_REMEDY}")
    check_seal(manifest, path, _REMEDY)
    check(manifest, _MANIFEST, lambda what: DataError(f"{path}: {what}. {_REMEDY}"))
    return manifest


class SessionDataset(IterableDataset[SessionBatch]):
    """Batches of one epoch, from ``start`` on: the share of one rank, or of one worker of it.

    Without workers its items are the rank's batches. With W workers a ``DataLoader`` yields W
    items a batch, one from each worker, to be joined in order: :class:`SessionLoader` does.

    Args:
        shards: What to read.
        batch_size: Most sessions of a batch over all ranks; the batches of a pool differ by one
            session at most.
        pool: Row groups that are shuffled together.
        seed: Of the order; ``None``: file order, the same in every epoch.
        rank: Whose share.
        world: Number of ranks. All yield equally many batches. A rank's share is empty only
            where a pool holds fewer sessions than there are ranks.
    Raises:
        DataError: The split holds no session.
        ValueError: ``batch_size`` is below 2 sessions a rank, or an argument is out of range.
    """

    def __init__(
        self,
        shards: Shards,
        batch_size: int,
        *,
        pool: int = 16,
        seed: int | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        super().__init__()
        if not 0 <= rank < world:
            raise ValueError(f"rank must be one of 0..{world - 1} (world {world}), got {rank}")
        if pool < 1 or (seed is not None and seed < 0):
            raise ValueError(f"pool must be at least 1 and seed at least 0, got {pool} and {seed}")
        if batch_size < (2 * world if world > 1 else 1):
            raise ValueError(
                f"batch_size counts the sessions of all ranks and must be at least 2 for each of "
                f"{world}, got {batch_size}"
            )
        if not len(shards):
            raise DataError(
                f"{shards.folder}: expected sessions in {shards.split}, got none. Prepare more "
                "sessions: one in ten goes to valid, one in ten to test."
            )
        self.shards, self.batch_size, self.pool, self.seed = shards, batch_size, pool, seed
        self.rank, self.world = rank, world
        self.epoch = self.start = 0

    def schedule(self) -> Schedule:
        """The order of the current epoch."""
        return Schedule(self.shards.sizes, self.batch_size, self.pool, self.seed, self.epoch)

    def __iter__(self) -> Iterator[SessionBatch]:
        worker = get_worker_info()
        within = (0, 1) if worker is None else (worker.id, worker.num_workers)
        schedule = self.schedule()
        for pool in schedule.pools:
            skip = max(self.start - pool.first_batch, 0)
            if skip < pool.batches:
                shares = schedule.shares(pool, (self.rank, self.world), within)[skip:]
                yield from self._batches(pool, shares)

    def _batches(self, pool: Pool, shares: list[Array]) -> Iterator[SessionBatch]:
        """Decode the row groups that the shares touch, and no other; then cut batches."""
        begin = np.cumsum(pool.sizes) - pool.sizes
        owner = np.repeat(np.arange(len(pool.groups)), pool.sizes)
        needed = np.unique(owner[np.concatenate(shares)])
        # Where a session of the pool stands among those that are decoded.
        place = np.full(pool.sessions, -1)
        count = 0
        for i in needed.tolist():
            place[begin[i] : begin[i] + pool.sizes[i]] = count + np.arange(pool.sizes[i])
            count += int(pool.sizes[i])
        groups = pool.groups[needed] if len(needed) else pool.groups[:1]
        rows = Rows.decode(pa.concat_tables([self.shards.table(int(g)) for g in groups]))
        for share in shares:
            yield assemble(rows, place[share], self.shards.tracks)


class SessionLoader:
    """Iterates over the batches of a rank, epoch after epoch, and knows where it stands.

    One pass of ``for batch in loader`` goes to the end of the current epoch, from wherever it
    stands; the next pass is the next epoch. A pass that is left early goes on where it was left;
    left at the last batch, what goes on is a pass without batches, and the epoch ends with it.

    Args:
        dataset: Its ``epoch`` and ``start`` are the loader's business from now on.
        workers: Processes that prepare batches ahead; 0: none, batches are made when asked for.
        pin_memory: Have batches in page-locked memory.
        prefetch: Batches that each worker prepares ahead.
    """

    def __init__(
        self,
        dataset: SessionDataset,
        *,
        workers: int = 0,
        pin_memory: bool = False,
        prefetch: int = 4,
    ):
        self.dataset, self.workers, self.pin_memory = dataset, workers, pin_memory
        self.prefetch = prefetch
        self.epoch = self.batch = 0

    def __len__(self) -> int:
        """Batches of the current epoch; another epoch may have a few more or less."""
        self.dataset.epoch = self.epoch
        return self.dataset.schedule().batches

    def __iter__(self) -> Iterator[SessionBatch]:
        self.dataset.epoch, self.dataset.start = self.epoch, self.batch
        total = self.dataset.schedule().batches
        parts = max(self.workers, 1)
        source = iter(
            DataLoader(
                self.dataset,
                batch_size=None,
                num_workers=self.workers,
                prefetch_factor=self.prefetch if self.workers else None,
                # Its own: a pass that begins must not move the random state of training.
                generator=torch.Generator(),
            )
        )
        while self.batch < total:
            batch = SessionBatch.join([next(source) for _ in range(parts)])
            # Counted before it is handed out: a cursor taken while it is in use lies behind it.
            self.batch += 1
            yield batch.pin_memory() if self.pin_memory else batch
        self.epoch, self.batch = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """The cursor, of plain values: behind the batch that was handed out last."""
        data = self.dataset
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "digest": data.shards.digest,
            "split": data.shards.split,
            "batch_size": data.batch_size,
            "pool": data.pool,
            "seed": data.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the batch at which ``state`` was taken, with any world and any workers.

        Raises:
            DataError: The cursor belongs to other shards or to another order of their sessions.
        """
        own = self.state_dict()
        missing = own.keys() - state.keys()
        if missing:
            raise DataError(f"cursor: expected {sorted(own)}, got no {sorted(missing)}.")
        for name in own.keys() - {"epoch", "batch"}:
            if state[name] != own[name]:
                raise DataError(
                    f"cursor: expected {name} {own[name]!r}, as of this dataset, got "
                    f"{state[name]!r}. Resume with the shards and settings of the first run."
                )
        for name in ("epoch", "batch"):
            if not isinstance(state[name], int) or state[name] < 0:
                raise DataError(
                    f"cursor: expected {name} to be a whole number from 0, got {state[name]!r}. "
                    "Resume with a checkpoint that is as it was written."
                )
        self.epoch, self.batch = state["epoch"], state["batch"]
