"""The pictures: written, decodable, and showing what is in the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.layers import pictures
from bench.shapes import Case
from maskmoe_kernels.experiments.shared import plot_style
from tests.bench.made import document, result
from tests.experiments.pixels import count, pixels

pytest.importorskip("matplotlib")

FAMILIES = ("toy3", "ncf4", "pairs22")


def run(ours: float) -> dict[str, Any]:
    times = {"ours": ours, "exact": 200.0, "floor": 20.0}
    cases = [Case(f, d, b) for f in FAMILIES for d in (16, 64) for b in (256, 4096)]
    return document(*(result(case, times) for case in cases))


def test_both_are_drawn(tmp_path: Path) -> None:
    assert pictures.draw(run(100.0), tmp_path) is None
    for name in (pictures.SPEEDUP, pictures.ROOFLINE):
        assert min(pixels(tmp_path / name).shape[:2]) > 600
    for color in (plot_style.SKY, plot_style.BLUE):  # one a batch
        assert count(tmp_path / pictures.SPEEDUP, color) > 500
    for color in (plot_style.ORANGE, plot_style.VERMILLION):  # one a width
        assert count(tmp_path / pictures.ROOFLINE, color) > 300


def test_losses_hang_below_the_line(tmp_path: Path) -> None:
    """The points of a gain lie above the line at 1, those of a loss below it."""
    heights = []
    for name, ours in (("gain", 50.0), ("loss", 800.0)):
        pictures.draw(run(ours), tmp_path / name)
        image = pixels(tmp_path / name / pictures.SPEEDUP)
        shaded = (image[..., 0] - image[..., 2]).clamp(min=0)  # below 1 the ground is reddish
        heights.append(float((shaded > 8).any(1).sum()) / len(image))
    assert heights[1] > 1.5 * heights[0] > 0


def test_nothing_measured_is_said(tmp_path: Path) -> None:
    assert pictures.draw(document(), tmp_path) == "nothing was measured"
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot_style, "unsupported_reason", lambda: "matplotlib is not installed")
    assert pictures.draw(run(100.0), tmp_path) == "matplotlib is not installed"
