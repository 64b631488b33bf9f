"""A few hundred damaged files; ``python -m tests.fuzz files`` tries many more."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="reads prepared sessions")
pytest.importorskip("resource", reason="bounds memory as POSIX does")

from maskmoe_kernels import files as durable
from tests.fuzz import files


def test_damaged_files_load_as_they_were_or_are_refused() -> None:
    files.run(120, seed=20)


def test_checksums_that_nobody_verifies_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer sees what it is for: damage to numbers that loads silently."""
    monkeypatch.setattr("maskmoe_kernels.experiments.shared.checkpoint._verify", lambda file: None)
    with pytest.raises(AssertionError, match=r"seed 0, case \d+.*another content"):
        files.run(400, seed=0)


def test_a_case_is_the_same_twice() -> None:
    damaged = []
    for _ in range(2):
        draw = files.random.Random("0/1")
        damaged.append([damage(bytes(range(256)) * 40, draw) for damage in files.DAMAGES])
    assert damaged[0] == damaged[1]


def test_checksum_of_a_part(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"a" * 3_000_000 + b"b")
    (tmp_path / "y").write_bytes(b"a")
    assert durable.checksum(tmp_path / "x", 2_999_999, 3_000_000) == durable.checksum(
        tmp_path / "y"
    )
    assert durable.checksum(tmp_path / "x") != durable.checksum(tmp_path / "x", 0, 3_000_000)
