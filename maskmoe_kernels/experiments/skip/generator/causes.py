"""The causes of the labels of half B in generated sessions: their rules, and a reader of them.

Each track of half B has exactly one cause. A cause has a rule, which looks only at the groups that
``CAUSE_GROUPS`` lists. Sessions are drawn such that no two rules apply to one track:

======================  ==========================================  ==============================
cause                   its rule applies to                         it skips the track if
======================  ==========================================  ==============================
chance                  tracks to which no other rule applies       a random draw decides so
persistence             the first six tracks of B if the last four  those were skipped
                        or more tracks of A have the same label
context                 all of B with a free account                the listener did not choose
                                                                    the music: neither the own
                                                                    collection nor the catalogue
popularity              a track whose popularity is below 91.5 or   it is below 91.5
                        above 98.5
music                   an acoustic or energetic track, if all of   the two kinds differ
                        A is acoustic or all of A is energetic
context+interaction     all of B with a paying account on shuffle   either the listener sought
                                                                    forward in A or did not choose
                                                                    the music, but not both
popularity+music        an instrumental track of average            it is either in major or from
                        popularity and style                        2014 or later, but not both
======================  ==========================================  ==============================

In the last two rules, one group alone carries no information about the label. Of the labels that
rules determine, a share ``NOISE`` is flipped; their tracks do not count as decisive.
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
from maskmoe_kernels.experiments.skip.data.arrays import UInt64s
from maskmoe_kernels.experiments.skip.data.columns import MSSD
from maskmoe_kernels.experiments.skip.data.features import SessionBatch
from maskmoe_kernels.experiments.skip.data.ids import hash_ids
from maskmoe_kernels.experiments.skip.schema.schema import Schema

#: Cause -> the groups that an expert must see to predict its labels. Position is left out: every
#: subset contains it.
CAUSE_GROUPS = MSSD.causes
CAUSES = tuple(CAUSE_GROUPS)
#: Share of the labels determined by a rule that are flipped.
NOISE = 0.025
#: Columns of ``causes_*.parquet``.
SCHEMA = pa.schema(
    [
        ("session_id", pa.string()),
        ("session_position", pa.uint8()),
        ("cause", pa.dictionary(pa.int8(), pa.string())),
        ("decisive", pa.bool_()),
    ]
)
_CHECKSUM = b"checksum"
_Decoded = tuple[UInt64s, npt.NDArray[np.int8], npt.NDArray[np.bool_]]


class Causes:
    """The cause of each track of half B of generated sessions.

    Of sessions of which slices are drawn, the cause of each track is known.

    Args:
        folder: The folder of ``causes_*.parquet``, as the generator wrote them.
        schema: The schema of the sessions.
    Raises:
        DataError: The folder holds no such file, or a damaged one.
    """

    def __init__(self, folder: str | Path, schema: Schema = MSSD):
        self.schema = schema
        paths = sorted(Path(folder).glob("causes_*.parquet"))
        if not paths:
            raise DataError(
                f"{folder}: expected causes_*.parquet, got none. Only generated sessions have "
                "known causes: name the folder of `maskmoe skip generate`."
            )
        parts = [_read(path, schema) for path in paths]
        digests = np.concatenate([part[0] for part in parts])
        order = np.argsort(digests)
        self._digests: UInt64s = digests[order]
        self._causes = np.concatenate([part[1] for part in parts])[order]
        self._decisive = np.concatenate([part[2] for part in parts])[order]

    def __len__(self) -> int:
        """Number of sessions."""
        return len(self._digests)

    def of(
        self, session_ids: Sequence[str], begin: npt.NDArray[np.int64] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The causes of a batch of sessions, padded as the batch is.

        Args:
            session_ids: Their ids, ``B`` of them.
            begin: Where half B begins among the tracks whose causes are known, ``(B,)``; ``None``:
                with the first.
        Returns:
            Of each track of half B, the index into the causes of the schema, ``(B, T)``
            int64, and whether the
            cause is decisive, ``(B, T)`` bool. Padding is chance and not decisive.
        Raises:
            DataError: The causes of a session are not known.
        """
        digests = hash_ids(list(session_ids))
        place = np.minimum(np.searchsorted(self._digests, digests), len(self) - 1)
        if (unknown := (self._digests[place] != digests).nonzero()[0]).size:
            raise DataError(
                f"session {session_ids[int(unknown[0])]!r}: expected one of the {len(self)} "
                "generated sessions whose causes were read, got another. Name their folder."
            )
        half = self.schema.sessions.half
        columns = np.zeros((len(place), 1), np.int64) if begin is None else begin[:, None]
        columns = columns + np.arange(half)
        known = columns < self._causes.shape[1]
        at = place[:, None], np.where(known, columns, 0)
        causes = torch.from_numpy(np.where(known, self._causes[at], 0).astype(np.int64))
        return causes, torch.from_numpy(self._decisive[at] & known)

    def of_batch(self, batch: SessionBatch) -> tuple[Tensor, Tensor]:
        """The causes of a batch of sessions or slices; see :meth:`of`."""
        begin = None
        if batch.offset is not None:
            begin = (batch.offset + (~batch.first_padding).sum(1)).numpy()
        return self.of(batch.session_ids, begin)


def _read(path: Path, schema: Schema) -> _Decoded:
    try:
        with pq.ParquetFile(path) as file:
            found = file.schema_arrow
            if not found.equals(SCHEMA):
                raise ValueError(f"the columns {found.names}")
            table = file.read(use_threads=False).combine_chunks()
            decoded = _decode(table, schema)
        expected = (found.metadata or {}).get(_CHECKSUM)
        if expected is not None and expected != _digest(decoded):
            raise ValueError("a content that its checksum is not of")
    except (OSError, ValueError, IndexError, TypeError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: expected a whole file of causes, got {error}. Delete its log_*.csv and run "
            "`maskmoe skip generate` again."
        ) from error
    return decoded


def sealed(table: Any, schema: Schema = MSSD) -> Any:
    """A table of causes with a checksum of its content in the metadata, which readers verify."""
    return table.replace_schema_metadata(
        {_CHECKSUM: _digest(_decode(table.combine_chunks(), schema))}
    )


def _digest(decoded: _Decoded) -> bytes:
    digest = hashlib.sha256()
    for part in decoded:
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest().encode()


def _decode(table: Any, schema: Schema) -> _Decoded:
    """Digests of the sessions' ids, and causes and decisive flags of their tracks of half B.

    Returns:
        ``(sessions,)``, ``(sessions, width)`` and ``(sessions, width)``.
    """
    causes_of = tuple(schema.causes)
    names = table["cause"].combine_chunks()
    code = np.array([causes_of.index(name) for name in names.dictionary.to_pylist()], np.int8)
    # The rows of a session are consecutive and in order.
    digests = hash_ids(table["session_id"])
    starts = np.append(0, (digests[1:] != digests[:-1]).nonzero()[0] + 1)
    count = np.diff(starts, append=len(table))
    width = schema.sessions.longest if schema.sessions.slice else schema.sessions.half
    causes = np.zeros((len(starts), width), np.int8)
    decisive = np.zeros((len(starts), width), bool)
    real = np.arange(width) < count[:, None]
    causes[real] = code[names.indices.to_numpy()]
    decisive[real] = table["decisive"].to_numpy()
    return digests[starts], causes, decisive
