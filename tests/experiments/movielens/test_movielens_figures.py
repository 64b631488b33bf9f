"""Figures of MovieLens: the frontier."""

import itertools

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


def test_experts_that_suffice_are_drawn_beside_the_mixture(tmp_path):
    points = [
        {"tolerance": t, "hr": h, "ndcg": h / 2, "decided": {"content": 1 - a, "all": a}}
        for t, h, a in ((0.5, 0.66, 0.5), (1.0, 0.65, 0.2), (2.0, 0.58, 0.02))
    ]
    mixture = [{"sharpness": 1, "hr": 0.66, "ndcg": 0.4, "decided": {"content": 0.6, "all": 0.4}}]
    alone, beside = tmp_path / "alone.png", tmp_path / "beside.png"
    level = {"hr": 0.67, "ndcg": 0.34}
    figures.frontier(points, 1.0, alone, setting="tolerance")
    figures.frontier(points, 1.0, beside, setting="tolerance", mixture=mixture, prediction=level)
    assert count(alone, plot_style.VERMILLION) > 300
    assert count(beside, plot_style.GREY) > count(alone, plot_style.GREY)
    assert count(beside, plot_style.BLACK, 0) > count(alone, plot_style.BLACK, 0)
    with pytest.raises(LayoutError, match=r"the tolerance of a point, one of \[0.5, 1.0, 2.0\]: 3"):
        figures.frontier(points, 3, alone, setting="tolerance")


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.66, 0.70], (0.6, 0.8)), ([0.58, 0.71], (0.55, 0.75)), ([0.3, 0.71], (0.0, 1.0))],
)
def test_a_fifth_of_the_range_is_shown_where_that_is_enough(values, expected):
    assert figures._shown_range(values) == pytest.approx(expected)


def test_the_log_axis_names_the_chosen_point_and_both_ends():
    tolerances = [0.25, 0.5, 0.75, 1.0, 1.5, 2.0]
    assert figures._labelled(tolerances, 3) == tolerances
    powers = [1, 1.25, 1.5, 2, 3, 4, 6, 8, 16]
    for chosen in range(len(powers)):
        named = figures._labelled(powers, chosen)
        assert {powers[chosen], 1, 16} - set(named) <= {1 if chosen == 1 else 0}
        assert all(b / a > 1.3 for a, b in itertools.pairwise(named))
