"""Digests of ids."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from maskmoe_kernels.experiments.skip.data.ids import hash_ids


@given(st.lists(st.text(max_size=40), max_size=30), st.integers(0, 3))
def test_hash_tells_ids_apart_and_knows_no_offset(ids: list[str], skip: int) -> None:
    digests = hash_ids(ids)
    assert len(set(digests.tolist())) == len({*ids})
    assert np.array_equal(hash_ids(pa.array(ids, pa.string())[skip:]), digests[skip:])


def test_hash_is_the_same_for_ever() -> None:
    # Splits depend on it.
    assert hash_ids(["0_00006f66", ""]).tolist() == [
        7477730767629313226,
        16294208416658607535,
    ]
