"""Causes read beside batches of their sessions."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.skip.data.prepare import prepare
from maskmoe_kernels.experiments.skip.data.sessions import SessionDataset, SessionLoader
from maskmoe_kernels.experiments.skip.data.shards import Shards
from maskmoe_kernels.experiments.skip.generator.causes import CAUSES, Causes
from maskmoe_kernels.experiments.skip.generator.generate import generate
from maskmoe_kernels.experiments.skip.generator.settings import GeneratorSettings


def test_causes_meet_their_batches(tmp_path: Path) -> None:
    generate(tmp_path / "csv", GeneratorSettings(400, seed=4, tracks=2_000, chunk=150))
    prepare([tmp_path / "csv"], tmp_path / "shards", strict=True)
    tables = [pq.read_table(p).to_pylist() for p in sorted((tmp_path / "csv").glob("causes_*"))]
    rows = {(row["session_id"], row["session_position"]): row for t in tables for row in t}
    causes = Causes(tmp_path / "csv")
    assert len(causes) == 400
    met = 0
    for batch in SessionLoader(SessionDataset(Shards(tmp_path / "shards", "train"), 64, seed=1)):
        cause, decisive = causes.of(batch.session_ids)
        assert (cause.dtype, decisive.dtype) == (torch.int64, torch.bool)
        real = ~batch.second_padding
        assert not cause[~real].any()
        assert not decisive[~real].any()
        position: Tensor = ((batch.second[..., 0] + 1) * 10).round().long()
        for b, t in real.nonzero().tolist():
            row = rows[batch.session_ids[b], int(position[b, t])]
            assert (CAUSES[cause[b, t]], bool(decisive[b, t])) == (row["cause"], row["decisive"])
            met += 1
    assert met > 1_000
    with pytest.raises(DataError, match=r"session 'x': expected one of the 400 generated"):
        causes.of([batch.session_ids[0], "x"])
    with pytest.raises(DataError, match=r"expected causes_\*\.parquet, got none"):
        Causes(tmp_path)
    (tmp_path / "csv" / "causes_1.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"causes_1\.parquet: expected a whole file of causes"):
        Causes(tmp_path / "csv")
