"""Shards: sessions found by id, and damaged folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.skip.data.columns import TRACK_FEATURES
from maskmoe_kernels.experiments.skip.data.shards import Shards
from tests.experiments.skip.data.batches import loader


def test_damaged_folders(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected the manifest of prepared shards, got No such"):
        Shards(tmp_path, "train")
    (tmp_path / "logs").mkdir()
    with pytest.raises(DataError, match=r"did not finish in this folder\. Run it again .*--resume"):
        Shards(tmp_path, "train")
    manifest = json.loads((data / "manifest.json").read_text())
    path = tmp_path / "manifest.json"
    for text, message in (
        ("{", "expected json, got"),
        (json.dumps(manifest | {"format": 0}), "expected format 3, got 0"),
        (json.dumps(manifest), r"log_0\.parquet: expected \d+ bytes, got no such file. Run"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            Shards(tmp_path, "train")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "log_0.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"log_0\.parquet: expected \d+ bytes, got 4 bytes"):
        Shards(tmp_path, "train")
    with pytest.raises(ValueError, match=r"\['train', 'valid', 'test'\], got 'all'"):
        Shards(data, "all")


def test_find(shards: Shards, rows: dict[str, list[dict]]) -> None:
    name = list(rows)[-1]
    batch, table = shards.find(name)
    (expected,) = (b for b in loader(shards, 2) if name in b.session_ids)
    k = expected.session_ids.index(name)
    assert torch.equal(batch.first[0], expected.first[k])
    assert torch.equal(batch.target[0], expected.target[k])
    own = [{key: row[key] for key in rows[name][0]} for row in table.to_pylist()]
    assert own == rows[name]
    assert {"track_id", *TRACK_FEATURES} <= set(table.column_names)
    with pytest.raises(DataError, match=r"session 'none' is not among the \d+ sessions of train"):
        shards.find("none")
