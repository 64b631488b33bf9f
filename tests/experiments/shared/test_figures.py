"""Figures: written, decodable, and with the colours of what they show."""

import sys

import pytest
import torch

from maskmoe_kernels import BackendError, LayoutError, SubsetFamily, mixture
from maskmoe_kernels.experiments.shared import figures

pytest.importorskip("matplotlib")

PLANE = SubsetFamily.powerset({"x1": 1, "x2": 1})
MOVIELENS = SubsetFamily(
    {"user": 64, "item": 64, "content": 32},
    {
        "content": ["content"],
        "user": ["content", "user"],
        "item": ["content", "item"],
        "all": ["content", "user", "item"],
    },
)


def pixels(path):
    """The image, ``(height, width, 3)`` in 0..255; fails if it is no image."""
    from matplotlib.image import imread

    return (torch.from_numpy(imread(path)[..., :3].copy()) * 255).round().long()


def count(path, color, tolerance=3):
    """Pixels of that colour."""
    rgb = torch.tensor([int(color[k : k + 2], 16) for k in (1, 3, 5)])
    return int(((pixels(path) - rgb).abs().amax(-1) <= tolerance).sum())


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
    for color in (figures.BLUE, figures.VERMILLION, figures.GREEN):
        assert count(tmp_path / "panels.png", color) > 5000
    # Nothing is attributed to x2: its colour is in the legend only.
    assert count(tmp_path / "panels.png", figures.PURPLE) < 1500


def test_toy_plane_mixes_the_experts_colours(tmp_path):
    def halves(p):
        left = p[:, 0] < 0
        return torch.stack([9.0 * left, 0 * p[:, 0], -9.0 * ~left], 1)

    figures.toy_plane([lattice(halves)], PLANE.names, tmp_path / "plane.png")
    image = pixels(tmp_path / "plane.png")
    assert count(tmp_path / "plane.png", figures.GREEN) > 0.2 * image[..., 0].numel()
    assert count(tmp_path / "plane.png", figures.BLACK) > 0.2 * image[..., 0].numel()
    green = (image - torch.tensor([0x00, 0x9E, 0x73])).abs().amax(-1) <= 3
    upper_half = green[: len(green) // 2].nonzero()[:, 1].double().mean()
    assert upper_half < image.shape[1] / 2  # the first input runs to the right
    for color in (figures.BLUE, figures.VERMILLION):
        assert count(tmp_path / "plane.png", color) > 100


def test_plane_refuses_what_is_no_lattice(tmp_path):
    points = torch.randn(10, 2)
    bad = plane(points, torch.randn(10, 3), torch.zeros(10))
    with pytest.raises(LayoutError, match="square lattice, got 10"):
        figures.toy_plane([bad], PLANE.names, tmp_path / "x.png")
    with pytest.raises(LayoutError, match="up to 3 experts, got 4"):
        figures.toy_panels([bad], MOVIELENS.names, tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_bars_have_the_lengths_of_their_shares(tmp_path):
    names, path = MOVIELENS.names, tmp_path / "bars.png"
    figures.attribution_bars(names, [0.1, 0.2, 0.3, 0.4], [0.2, 0.2, 0.2, 0.4], path)
    mean = (pixels(path) - torch.tensor([0xE6, 0x9F, 0x00])).abs().amax(-1) <= 3
    lengths = [int(row.sum()) for row in mean if row.sum() > 60]  # the legend's patch is shorter
    widths = sorted(set(lengths))
    assert len(widths) == 4
    assert widths[3] / widths[0] == pytest.approx(4, rel=0.03)
    assert count(path, figures.GREY) < 1000  # only the rims of letters
    figures.attribution_bars(names, [0.25] * 4, [0.25] * 4, path, paper=[0.25] * 4)
    assert count(path, figures.GREY) > 20_000
    with pytest.raises(LayoutError, match="paper must hold 4 values, got 1"):
        figures.attribution_bars(names, [0.25] * 4, [0.25] * 4, path, paper=[1.0])


def test_learning_curves_mark_the_kept_epoch(tmp_path):
    columns = {"train_loss": [0.5, 0.4, 0.3], "HR@10": [0.4, 0.6, 0.5], "NDCG@10": [0.2, 0.3, 0.2]}
    records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    figures.learning_curves({"black box": columns}, tmp_path / "columns.png")
    figures.learning_curves({"black box": records}, tmp_path / "records.png")
    assert torch.equal(pixels(tmp_path / "columns.png"), pixels(tmp_path / "records.png"))
    assert figures._kept_epoch(columns, "NDCG@10") == 1
    assert count(tmp_path / "columns.png", figures.BLUE) > 500
    with pytest.raises(LayoutError, match="nothing to draw"):
        figures.learning_curves({"black box": {"seconds": [1.0]}}, tmp_path / "x.png")


def test_frontier_marks_ends_choice_and_black_box(tmp_path):
    points = [
        {"sharpness": s, "hr": h, "ndcg": h / 2, "decided": {"content": 1 - a, "all": a}}
        for s, h, a in ((4, 0.66, 0.9), (1, 0.61, 0.4), (2, 0.64, 0.7))
    ]
    path = tmp_path / "frontier.png"
    figures.frontier(points, 2, path)
    without = count(path, figures.BLACK, 0)
    assert count(path, figures.VERMILLION) > 300
    figures.frontier(points, 2, path, black_box={"hr": 0.7, "ndcg": 0.4})
    assert count(path, figures.BLACK, 0) > without
    with pytest.raises(LayoutError, match=r"one of \[1.0, 2.0, 4.0\]: 3"):
        figures.frontier(points, 3, path)


@pytest.mark.parametrize(
    "family",
    [
        PLANE,
        MOVIELENS,
        SubsetFamily({"a": 1}, {"only": ["a"]}),
        SubsetFamily.powerset(dict.fromkeys("abcdef", 1), min_size=0),
        SubsetFamily({f"g{k}": 1 for k in range(64)}, {f"e{k}": [f"g{k}"] for k in range(64)}),
    ],
    ids=lambda family: str(family.num_experts),
)
def test_hasse_boxes_do_not_overlap(tmp_path, family):
    figures.hasse(family, tmp_path / "hasse.png")
    assert count(tmp_path / "hasse.png", figures.BLUE, 40) > 50 * family.num_experts
    nodes = {name: figures._node(name, groups) for name, groups in family.subsets.items()}
    width, height, _, _ = figures._place(nodes, family, family.hasse_edges())
    boxes = [node for node in nodes.values() if node.name]
    for k, a in enumerate(boxes):
        assert a.width / 2 <= a.x <= width
        assert a.height / 2 <= a.y <= height - a.height / 2
        for b in boxes[:k]:
            apart_x = abs(a.x - b.x) >= (a.width + b.width) / 2
            apart_y = abs(a.y - b.y) >= (a.height + b.height) / 2
            assert apart_x or apart_y


def test_hasse_refuses_what_nobody_could_read(tmp_path):
    with pytest.raises(LayoutError, match="up to 64 experts, this family has 127"):
        figures.hasse(SubsetFamily.powerset(dict.fromkeys("abcdefg", 1)), tmp_path / "x.png")


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "maskmoe_kernels[plot]" in figures.obstacle()
    with pytest.raises(BackendError, match=r"pip install \"maskmoe_kernels\[plot\]\""):
        figures.hasse(PLANE, tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_drawing_leaves_global_settings_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.hasse(PLANE, tmp_path / "hasse.png")
    assert dict(matplotlib.rcParams) == before
