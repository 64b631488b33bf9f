"""docs/estimators.md: its code runs, and does what its words say."""

import re
from pathlib import Path

import pytest

pytest.importorskip("maskmoe_kernels.estimators", reason="the extra sklearn is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "estimators.md"

if not PAGE.is_file():
    pytest.skip("not a checkout: there are no docs", allow_module_level=True)


def test_its_code_does_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S):
        exec(block, names)
    model, frame, found = names["model"], names["frame"], names["found"]
    assert model.score(frame, names["buys"]) > 0.85
    assert names["stream"].score(frame, names["buys"]) > 0.5
    assert re.match(r"The answer \d+\.\d% for yes ", found.words(0))
    assert (tmp_path / "report.html").stat().st_size > 50_000
    assert [*names["whole"].to_frame()] == ["importance", "suffices alone"]
