"""Figures of the toy tasks: with the colours of what they show."""

import pytest
import torch

from maskmoe_kernels import LayoutError, SubsetFamily, mixture
from maskmoe_kernels.experiments.shared import plot_style
from maskmoe_kernels.experiments.toy import figures
from tests.experiments.pixels import count, pixels

pytest.importorskip("matplotlib")

PLANE = SubsetFamily.powerset({"x1": 1, "x2": 1})


def plane(points, logits, labels):
    return figures.Plane(
        axes=("x1", "x2"),
        points=points,
        labels=labels,
        experts=torch.sigmoid(2 * logits),
        mixture=mixture(logits, PLANE),
        centers=torch.tensor([[-1.0, 0.0], [1.0, 0.0]]),
        center_labels=torch.tensor([0.0, 1.0]),
    )


def lattice(logits_of):
    line = torch.linspace(-2, 2, 40)
    points = torch.cartesian_prod(line, line)
    return plane(points, logits_of(points), (points[:, 0] > 0).float())


def test_toy_panels_show_labels_and_experts(tmp_path):
    only_x1 = lattice(lambda p: torch.stack([9 * p[:, 0].sign(), 0 * p[:, 0], 0 * p[:, 0]], 1))
    figures.toy_panels([only_x1], PLANE.names, tmp_path / "panels.png")
    height, width, _ = pixels(tmp_path / "panels.png").shape
    assert min(height, width) > 1000
    for color in (plot_style.BLUE, plot_style.VERMILLION, plot_style.GREEN):
        assert count(tmp_path / "panels.png", color) > 5000
    # Nothing is attributed to x2: its colour is in the legend only.
    assert count(tmp_path / "panels.png", plot_style.PURPLE) < 1500


def test_toy_plane_mixes_the_experts_colours(tmp_path):
    def halves(p):
        left = p[:, 0] < 0
        return torch.stack([9.0 * left, 0 * p[:, 0], -9.0 * ~left], 1)

    figures.toy_plane([lattice(halves)], PLANE.names, tmp_path / "plane.png")
    image = pixels(tmp_path / "plane.png")
    assert count(tmp_path / "plane.png", plot_style.GREEN) > 0.2 * image[..., 0].numel()
    assert count(tmp_path / "plane.png", plot_style.BLACK) > 0.2 * image[..., 0].numel()
    green = (image - torch.tensor([0x00, 0x9E, 0x73])).abs().amax(-1) <= 3
    upper_half = green[: len(green) // 2].nonzero()[:, 1].double().mean()
    assert upper_half < image.shape[1] / 2  # the first input runs to the right
    for color in (plot_style.BLUE, plot_style.VERMILLION):
        assert count(tmp_path / "plane.png", color) > 100


def test_plane_refuses_what_is_no_lattice(tmp_path):
    points = torch.randn(10, 2)
    bad = plane(points, torch.randn(10, 3), torch.zeros(10))
    with pytest.raises(LayoutError, match="square lattice, got 10"):
        figures.toy_plane([bad], PLANE.names, tmp_path / "x.png")
    with pytest.raises(LayoutError, match="up to 3 experts, got 4"):
        figures.toy_panels([bad], ["content", "user", "item", "all"], tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []
