"""Figures of MovieLens: the frontier."""

import pytest

from maskmoe_kernels import LayoutError
from maskmoe_kernels.experiments.movielens import figures
from maskmoe_kernels.experiments.shared import plot_style
from tests.experiments.pixels import count

pytest.importorskip("matplotlib")


def test_frontier_marks_ends_choice_and_black_box(tmp_path):
    points = [
        {"sharpness": s, "hr": h, "ndcg": h / 2, "decided": {"content": 1 - a, "all": a}}
        for s, h, a in ((4, 0.66, 0.9), (1, 0.61, 0.4), (2, 0.64, 0.7))
    ]
    path = tmp_path / "frontier.png"
    figures.frontier(points, 2, path)
    without = count(path, plot_style.BLACK, 0)
    assert count(path, plot_style.VERMILLION) > 300
    figures.frontier(points, 2, path, black_box={"hr": 0.7, "ndcg": 0.4})
    assert count(path, plot_style.BLACK, 0) > without
    with pytest.raises(LayoutError, match=r"one of \[1.0, 2.0, 4.0\]: 3"):
        figures.frontier(points, 3, path)
