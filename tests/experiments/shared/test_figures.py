"""Figures that experiments share: written, decodable, and with the colours of what they show."""

import sys

import pytest
import torch

from maskmoe_kernels import BackendError, LayoutError, SubsetFamily
from maskmoe_kernels.experiments.shared import charts, contributions, hasse, plot_style
from tests.experiments.pixels import count, pixels

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


def test_bars_have_the_lengths_of_their_shares(tmp_path):
    names, path = MOVIELENS.names, tmp_path / "bars.png"
    charts.attribution_bars(names, [0.1, 0.2, 0.3, 0.4], [0.2, 0.2, 0.2, 0.4], path)
    mean = (pixels(path) - torch.tensor([0xE6, 0x9F, 0x00])).abs().amax(-1) <= 3
    lengths = [int(row.sum()) for row in mean if row.sum() > 60]  # the legend's patch is shorter
    widths = sorted(set(lengths))
    assert len(widths) == 4
    assert widths[3] / widths[0] == pytest.approx(4, rel=0.03)
    assert count(path, plot_style.GREY) < 1000  # only the rims of letters
    charts.attribution_bars(names, [0.25] * 4, [0.25] * 4, path, paper=[0.25] * 4)
    assert count(path, plot_style.GREY) > 20_000
    with pytest.raises(LayoutError, match="paper must hold 4 values, got 1"):
        charts.attribution_bars(names, [0.25] * 4, [0.25] * 4, path, paper=[1.0])


def test_learning_curves_mark_the_kept_epoch(tmp_path):
    columns = {"train_loss": [0.5, 0.4, 0.3], "HR@10": [0.4, 0.6, 0.5], "NDCG@10": [0.2, 0.3, 0.2]}
    records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    charts.learning_curves({"black box": columns}, tmp_path / "columns.png")
    charts.learning_curves({"black box": records}, tmp_path / "records.png")
    assert torch.equal(pixels(tmp_path / "columns.png"), pixels(tmp_path / "records.png"))
    assert charts._kept_epoch(columns, "NDCG@10") == 1
    assert count(tmp_path / "columns.png", plot_style.BLUE) > 500
    with pytest.raises(LayoutError, match="nothing to draw"):
        charts.learning_curves({"black box": {"seconds": [1.0]}}, tmp_path / "x.png")


def test_losses_of_two_kinds_have_panels_of_their_own(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(charts, "save", lambda figure, path: figures.append(figure))
    one = {"train_loss": [0.5], "Acc": [0.4]}
    losses = {"experts": "GEM loss", "black box": "cross-entropy"}
    charts.learning_curves({"experts": one, "black box": one}, tmp_path / "x.png", losses=losses)
    panels = [ax for ax in figures[0].axes if ax.get_visible()]
    assert [ax.get_title().partition(":")[0] for ax in panels] == [
        "GEM loss, training", "cross-entropy, training", "Acc, validation"
    ]  # fmt: skip
    figures[0].canvas.draw()
    for ax in panels:  # one epoch, one tick
        low, high = ax.get_xlim()
        assert [tick for tick in ax.get_xticks() if low <= tick <= high] == [1]


def test_hasse_explains_lines_only_where_there_are_some(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(hasse, "save", lambda figure, path: figures.append(figure))
    apart = SubsetFamily({"a": 1, "b": 1}, {"a": ["a"], "b": ["b"]})
    for family in (PLANE, apart):
        hasse.hasse(family, tmp_path / "x.png")
    said = [" ".join(text.get_text() for text in figure.texts) for figure in figures]
    assert ["A line joins" in text for text in said] == [True, False]


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
    hasse.hasse(family, tmp_path / "hasse.png")
    assert count(tmp_path / "hasse.png", plot_style.BLUE, 40) > 50 * family.num_experts
    nodes = {name: hasse._node(name, groups) for name, groups in family.subsets.items()}
    width, height, _, _ = hasse._place(nodes, family, family.hasse_edges())
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
        hasse.hasse(SubsetFamily.powerset(dict.fromkeys("abcdefg", 1)), tmp_path / "x.png")


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "maskmoe_kernels[plot]" in plot_style.unsupported_reason()
    with pytest.raises(BackendError, match=r"pip install \"maskmoe_kernels\[plot\]\""):
        hasse.hasse(PLANE, tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_drawing_leaves_global_settings_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    hasse.hasse(PLANE, tmp_path / "hasse.png")
    assert dict(matplotlib.rcParams) == before


def test_bars_of_a_waterfall_are_as_long_as_what_groups_add(tmp_path):
    path = tmp_path / "waterfall.png"
    contributions.waterfall({"a": 2.0, "b": -1.0}, path, title="t", base=("known", 0.5))
    up, down = count(path, plot_style.VERMILLION), count(path, plot_style.BLUE)
    assert up > 5000
    assert down / up == pytest.approx(0.5, rel=0.03, abs=0)
    assert count(path, plot_style.GREEN, 0) == 0
    answers = {"a": 2.4, "a + b": 1.5}
    contributions.waterfall(
        {"a": 1.5}, path, title="t", answers=answers, sufficient="a", tolerance=1.0
    )
    assert count(path, plot_style.GREEN, 0) > 100
    assert count(path, plot_style.BLUE) == 0
    with pytest.raises(LayoutError, match=r"an expert of answers, \['a', 'a \+ b'\]: 'c'"):
        contributions.waterfall({"a": 1.5}, path, title="t", answers=answers, sufficient="c")
    with pytest.raises(LayoutError, match="contributions is empty"):
        contributions.waterfall({}, path, title="t")


def test_contributions_over_data_show_the_largest_first(tmp_path):
    path = tmp_path / "contributions.png"
    phi = torch.tensor([[1.0, -4.0], [-1.0, 4.0]]).repeat(500, 1)
    contributions.over_data(["small", "large"], phi, path, title="t")
    bars = (pixels(path) - torch.tensor([0xD5, 0x5E, 0x00])).abs().amax(-1) <= 3
    rows = bars.sum(1)
    upper, lower = rows[: len(rows) // 2].sum(), rows[len(rows) // 2 :].sum()
    assert float(lower / upper) == pytest.approx(0.25, rel=0.05, abs=0)
    contributions.over_data(["small", "large"], phi, path, title="t", colour=phi, colour_name="x")
    for wrong in (phi[:0], phi[0], torch.zeros(3, 3)):
        with pytest.raises(LayoutError, match=r"phi must be \(n, 2\)"):
            contributions.over_data(["small", "large"], wrong, path, title="t")
    with pytest.raises(LayoutError, match="colour must be"):
        contributions.over_data(["small", "large"], phi, path, title="t", colour=phi[:3])


def test_an_interaction_matrix_is_lightest_where_groups_act_most(tmp_path):
    path = tmp_path / "interactions.png"
    size = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    contributions.interaction_matrix(["a", "b"], size, path, title="t")
    darkest, lightest = "#00224E", "#FEE838"  # the ends of cividis
    dark, light = count(path, darkest, 2), count(path, lightest, 2)
    assert dark > 5000
    assert light == pytest.approx(dark, rel=0.05, abs=0)
    with pytest.raises(LayoutError, match=r"size must be \(2, 2\), got \(3, 3\)"):
        contributions.interaction_matrix(["a", "b"], torch.zeros(3, 3), path, title="t")
