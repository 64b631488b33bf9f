"""64-bit digests of ids, by which sessions and tracks are found, compared and split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from maskmoe_kernels.experiments.skip.data.arrays import UInt64s


def hash_ids(ids: Any) -> UInt64s:
    """A 64-bit digest of each id, the same on every machine and in every version.

    With the 160 million sessions of the full data set, the odds that any two ids have the same
    digest are 1 in 1400.

    Args:
        ids: ``pyarrow`` array of strings or a sequence of them, none null.
    Returns:
        ``(n,)`` uint64.
    """
    if isinstance(ids, Sequence):
        ids = pa.array(ids, pa.string())
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    if not len(ids):
        return np.empty(0, np.uint64)
    _, offsets, data = ids.buffers()
    bounds = np.frombuffer(offsets, np.int32)[ids.offset : ids.offset + len(ids) + 1]
    lengths = np.diff(bounds)
    words = -(-max(int(lengths.max()), 1) // 8)
    text = np.zeros((len(ids), 8 * words), np.uint8)
    if data is not None:
        filled = np.arange(8 * words) < lengths[:, None]
        text[filled] = np.frombuffer(data, np.uint8)[bounds[0] : bounds[-1]]
    digest = mix(lengths.astype(np.uint64))
    for word in text.view("<u8").T:
        # The padding of shorter ids is 0 and must not change their digest.
        digest = np.where(word != 0, mix(digest ^ word), digest)
    return digest


def mix(value: UInt64s) -> UInt64s:
    """Map each value to a different one with well mixed bits (the finaliser of splitmix64).

    Args:
        value: ``(n,)`` uint64.
    """
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
