"""Row groups and splits of the shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from maskmoe_kernels.experiments.skip.data.ids import hash_ids
from maskmoe_kernels.experiments.skip.data.prepare import prepare
from maskmoe_kernels.experiments.skip.data.shard_format import SPLITS, split_of
from tests.experiments.skip.data.files import manifest


def test_row_groups_hold_whole_sessions(source: Path, tmp_path: Path) -> None:
    prepare([source], tmp_path, row_group=7)
    for split, shards in manifest(tmp_path)["splits"].items():
        for shard in shards:
            file = pq.ParquetFile(tmp_path / shard["file"])
            assert file.num_row_groups == len(shard["row_groups"])
            assert all(size == 7 for size in shard["row_groups"][:-1])
            for i, size in enumerate(shard["row_groups"]):
                table = file.read_row_group(i)
                digest = hash_ids(table["session_id"])
                assert len(np.unique(digest)) == size
                assert {SPLITS[k] for k in split_of(digest)} == {split}
                lengths = table["session_length"].to_numpy()
                assert lengths[table["session_position"].to_numpy() == 1].sum() == len(table)


def test_split_is_80_10_10() -> None:
    share = np.bincount(split_of(hash_ids([f"0_{i}" for i in range(100_000)]))) / 100_000
    assert np.abs(share - [0.8, 0.1, 0.1]).max() < 0.005  # more than 4 deviations
