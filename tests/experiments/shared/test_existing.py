"""Results that are there already: continued or replaced only where that is asked for."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.existing import check_out


def ask(out: Path, continued: tuple[str, ...] = ("*.pt",), **given: bool) -> None:
    flags = {"resume": False, "overwrite": False} | given
    check_out(argparse.Namespace(out=out, **flags), ("*.pt", "report.json"), continued)


def test_an_empty_or_missing_folder_is_free(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "new"):
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            ask(out, **flags)
    assert not (tmp_path / "new").exists()


def test_a_run_is_refused_without_a_word_about_it(tmp_path: Path) -> None:
    (tmp_path / "content.pt").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"--out .*content\.pt.*--resume to.*--overwrite to"
    ) as told:
        ask(tmp_path)
    assert "\n" not in str(told.value)
    ask(tmp_path, resume=True)
    ask(tmp_path, overwrite=True)


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(DataError, match=r"report\.json.*but no \*\.pt from which --resume"):
        ask(tmp_path, resume=True)
    with pytest.raises(
        DataError, match=r"holds results already \(report\.json\). Give --overwrite"
    ):
        ask(tmp_path, continued=())
    ask(tmp_path, overwrite=True)


def test_a_folder_that_cannot_be_made_names_the_argument(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"^--out .*/file: cannot be written: .* Name another"):
        ask(tmp_path / "file")
