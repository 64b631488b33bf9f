"""The causes planted in generated sessions: their rules, what sees them, and what decided a track.

Exactly one cause decides each track of half B. The rules of a session look at the groups named
here and at no other, and the features they look at are drawn such that no two fire at once:

======================  ==========================================  ==============================
cause                   it decides                                  the track is skipped where
======================  ==========================================  ==============================
chance                  where nothing else does                     a coin says so
persistence             the first six tracks of B, where the last   those were skipped
                        four or more of A went the same way
context                 B of a free account                         others chose the music: no own
                                                                    collection or catalogue
popularity              a track whose popularity is below 91.5 or   it is below
                        above 98.5
music                   an acoustic or energetic track, after an    it is not of A's kind
                        A all acoustic or all energetic
context+interaction     B of a paying account on shuffle            the listener sought forward in
                                                                    A, or others chose the music,
                                                                    but not both
popularity+music        an instrumental track, neither popular nor  it is in major, or from 2014
                        unknown, neither acoustic nor energetic     on, but not both
======================  ==========================================  ==============================

In the last two rules neither group alone says anything about the label. Of what a rule decides,
``NOISE`` is turned round, and not called decisive.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.skip.data.mssd_columns import UInt64s, hash_ids
from maskmoe_kernels.experiments.skip.data.session_features import HALF

#: Cause -> the groups without which it cannot be seen; position is in every subset.
CAUSE_GROUPS: dict[str, frozenset[str]] = {
    "chance": frozenset(),
    "persistence": frozenset({"interaction"}),
    "context": frozenset({"context"}),
    "popularity": frozenset({"popularity"}),
    "music": frozenset({"music"}),
    "context+interaction": frozenset({"context", "interaction"}),
    "popularity+music": frozenset({"popularity", "music"}),
}
CAUSES = tuple(CAUSE_GROUPS)
#: Share of the tracks of a rule whose label is turned round.
NOISE = 0.025
SCHEMA = pa.schema(
    [
        ("session_id", pa.string()),
        ("session_position", pa.uint8()),
        ("cause", pa.dictionary(pa.int8(), pa.string())),
        ("decisive", pa.bool_()),
    ]
)


_SEAL = b"checksum"
_Decoded = tuple[UInt64s, npt.NDArray[np.int8], npt.NDArray[np.bool_]]


class Causes:
    """What decided each track of half B of generated sessions.

    Args:
        folder: Holds ``causes_*.parquet``, as the generator wrote them.
    Raises:
        DataError: It holds none, or one that is damaged.
    """

    def __init__(self, folder: str | Path):
        paths = sorted(Path(folder).glob("causes_*.parquet"))
        if not paths:
            raise DataError(
                f"{folder}: expected causes_*.parquet, got none. Only generated sessions have "
                "known causes: name the folder of `maskmoe skip generate`."
            )
        parts = [_read(path) for path in paths]
        digests = np.concatenate([part[0] for part in parts])
        order = np.argsort(digests)
        self._digests: UInt64s = digests[order]
        self._causes = np.concatenate([part[1] for part in parts])[order]
        self._decisive = np.concatenate([part[2] for part in parts])[order]

    def __len__(self) -> int:
        """Number of sessions."""
        return len(self._digests)

    def of(self, session_ids: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Index into ``CAUSES`` and the decisive flag of each track of B, padded as in a batch.

        Returns:
            ``(B, 10)`` int64 and ``(B, 10)`` bool; padding is chance and not decisive.
        Raises:
            DataError: The causes of a session are not known.
        """
        digests = hash_ids(list(session_ids))
        place = np.minimum(np.searchsorted(self._digests, digests), len(self) - 1)
        if (strange := (self._digests[place] != digests).nonzero()[0]).size:
            raise DataError(
                f"session {session_ids[int(strange[0])]!r}: expected one of the {len(self)} "
                "generated sessions whose causes were read, got another. Name their folder."
            )
        causes = torch.from_numpy(self._causes[place].astype(np.int64))
        return causes, torch.from_numpy(self._decisive[place])


def _read(path: Path) -> _Decoded:
    try:
        with pq.ParquetFile(path) as file:
            found = file.schema_arrow
            if not found.equals(SCHEMA):
                raise ValueError(f"the columns {found.names}")
            table = file.read(use_threads=False).combine_chunks()
            decoded = _decode(table)
        seal = (found.metadata or {}).get(_SEAL)
        if seal is not None and seal != _digest(decoded):
            raise ValueError("a content that its checksum is not of")
    except (OSError, ValueError, IndexError, TypeError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: expected a whole file of causes, got {error}. Delete its log_*.csv and run "
            "`maskmoe skip generate` again."
        ) from error
    return decoded


def sealed(table: Any) -> Any:
    """The same table of causes with a checksum of what is read from it."""
    return table.replace_schema_metadata({_SEAL: _digest(_decode(table.combine_chunks()))})


def _digest(decoded: _Decoded) -> bytes:
    digest = hashlib.sha256()
    for part in decoded:
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest().encode()


def _decode(table: Any) -> _Decoded:
    """Digest of each session, and cause and decisive flag of its tracks of B."""
    names = table["cause"].combine_chunks()
    code = np.array([CAUSES.index(name) for name in names.dictionary.to_pylist()], np.int8)
    # The rows of a session stand together, in order.
    digests = hash_ids(table["session_id"])
    starts = np.append(0, (digests[1:] != digests[:-1]).nonzero()[0] + 1)
    count = np.diff(starts, append=len(table))
    causes = np.zeros((len(starts), HALF), np.int8)
    decisive = np.zeros((len(starts), HALF), bool)
    real = np.arange(HALF) < count[:, None]
    causes[real] = code[names.indices.to_numpy()]
    decisive[real] = table["decisive"].to_numpy()
    return digests[starts], causes, decisive
