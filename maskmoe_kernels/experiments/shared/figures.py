"""Figures: toy planes, attribution, learning curves, Hasse diagrams, the sharpness frontier.

Drawn with matplotlib's object interface (the extra ``plot``); no global state is touched. Every
function writes a PNG atomically and returns nothing. Colours are Okabe and Ito's, which people
with any colour vision can tell apart.
"""

from __future__ import annotations

import importlib
import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskmoe_kernels.errors import BackendError, LayoutError
from maskmoe_kernels.experiments.shared.files import replacing
from maskmoe_kernels.layout.subsets import SubsetFamily
from maskmoe_kernels.ops.selection import Mixture

DPI = 150

BLUE, VERMILLION = "#0072B2", "#D55E00"  # labels 0 and 1
GREEN, PURPLE, BLACK = "#009E73", "#CC79A7", "#000000"
ORANGE, SKY = "#E69F00", "#56B4E9"
GREY = "#999999"
#: Colours of experts in a mix of three; none is that of a label.
EXPERTS = (GREEN, PURPLE, BLACK)
#: Colours and markers of curves.
CURVES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

MAX_HASSE = 64


@dataclass(frozen=True)
class Plane:
    """Samples or lattice points in a plane of two inputs, and what the experts say there.

    Attributes:
        axes: Names of the two inputs.
        points: ``(n, 2)``; for :func:`toy_plane` a square lattice, first input slowest.
        labels: ``(n,)`` in {0, 1}; unused by :func:`toy_plane`.
        experts: Expert predictions f^i, ``(n, H)``.
        mixture: Prediction, selection and attribution.
        centers: Clusters to mark in :func:`toy_plane`, ``(k, 2)``.
        center_labels: Their labels, ``(k,)``.
    """

    axes: tuple[str, str]
    points: Tensor
    labels: Tensor
    experts: Tensor
    mixture: Mixture
    centers: Tensor | None = None
    center_labels: Tensor | None = None


def obstacle() -> str | None:
    """Why no figure can be drawn, in words for the user; ``None`` when they can."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError:
        return (
            "matplotlib, which draws the figures, is not installed. "
            'Run: pip install "maskmoe_kernels[plot]"'
        )
    return None


# --- Toy: figure 5 and the plane ---------------------------------------------------------


def toy_panels(
    planes: Sequence[Plane], names: Sequence[str], path: str | Path, title: str = "Toy task"
) -> None:
    """Figure 5: labels, each expert (colour: prediction, opacity: selection), mixture, attribution.

    Args:
        planes: One block of panels for each.
        names: Of the experts, at most three.
        path: Where to write the PNG.
        title: What the task is.

    Raises:
        LayoutError: More than three experts: their colours could not be told apart in a mix.
        BackendError: matplotlib is missing.
    """
    _refuse_many(names)
    columns = 3
    rows = -(-(len(names) + 3) // columns)
    figure = canvas(3.6 * columns, 3.5 * rows * len(planes) + 1.5)
    axes = figure.subplots(rows * len(planes), columns, squeeze=False)
    for k, plane in enumerate(planes):
        flat = [ax for row in axes[k * rows : (k + 1) * rows] for ax in row]
        _panels_of_plane(flat, plane, names)
    figure.suptitle(f"{title}\nEach expert answers only where its own inputs suffice", fontsize=13)
    _label_and_expert_legend(figure, names)
    save(figure, path)


def _panels_of_plane(axes: Sequence[Any], plane: Plane, names: Sequence[str]) -> None:
    opaque = torch.ones(len(plane.points))
    shown = [("Labels", _label_colors(plane.labels), opaque)]
    for i, name in enumerate(names):
        alpha = plane.mixture.selection[:, i]
        # A trace of what is not selected stays visible, so that the clusters keep their places.
        shown.append((f"Expert {name}", _label_colors(plane.experts[:, i]), 0.04 + 0.96 * alpha))
    shown.append(("Mixture of the experts", _label_colors(plane.mixture.probability), opaque))
    shown.append(("Attribution", _mix(plane.mixture.attribution), opaque))
    for ax, (name, colors, alpha) in zip(axes, shown, strict=False):
        rgba = torch.cat([colors, alpha.to(colors).clamp(0, 1)[:, None]], 1).numpy()
        ax.scatter(*plane.points.T.numpy(), c=rgba, s=7, linewidths=0)
        _plane_axes(ax, plane, name)
    for ax in axes[len(shown) :]:
        ax.set_visible(False)


def toy_plane(
    planes: Sequence[Plane], names: Sequence[str], path: str | Path, title: str = "Toy task"
) -> None:
    """Attribution over the plane, with the decision boundary and the cluster centres.

    Arguments and errors as for :func:`toy_panels`; points are a square lattice.
    """
    _refuse_many(names)
    figure = canvas(6.2 * len(planes), 7.4)
    for ax, plane in zip(figure.subplots(1, len(planes), squeeze=False)[0], planes, strict=True):
        side = round(len(plane.points) ** 0.5)
        if side * side != len(plane.points):
            raise LayoutError(f"points must be a square lattice, got {len(plane.points)} of them")
        image = _mix(plane.mixture.attribution).view(side, side, 3).transpose(0, 1).numpy()
        low, high = float(plane.points.min()), float(plane.points.max())
        ax.imshow(image, origin="lower", extent=(low, high, low, high), interpolation="nearest")
        line = torch.linspace(low, high, side).numpy()
        probability = plane.mixture.probability.view(side, side).T.numpy()
        # White under a black dash: visible on every colour of the mix.
        ax.contour(line, line, probability, [0.5], colors="white", linewidths=3.5)
        ax.contour(line, line, probability, [0.5], colors="black", linewidths=1.2)
        _mark_centers(ax, plane)
        _plane_axes(ax, plane, "")
    figure.suptitle(f"{title}\nWhich expert answers where, and where the answer turns", fontsize=13)
    lines = module("lines")
    handles = [
        *_expert_handles(names, "attributed to {}"),
        lines.Line2D([], [], color="black", lw=1.2, label="decision boundary (prediction 0.5)"),
        *(_dot(color, f"cluster with label {k}", True) for k, color in _LABELS),
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=10,
        title="The experts' colours are mixed by their share of the attribution",
        title_fontsize=9,
    )
    save(figure, path)


_LABELS = ((0, BLUE), (1, VERMILLION))


def _mark_centers(ax: Any, plane: Plane) -> None:
    if plane.centers is None or plane.center_labels is None:
        return
    for label, color in _LABELS:
        at = plane.centers[plane.center_labels == label]
        ax.scatter(*at.T.numpy(), c=color, s=150, edgecolors="white", linewidths=1.8, zorder=3)
        for x, y in at.tolist():
            text = {"color": "white", "fontsize": 9, "fontweight": "bold", "zorder": 4}
            ax.text(x, y, str(label), ha="center", va="center_baseline", **text)


def _plane_axes(ax: Any, plane: Plane, title: str) -> None:
    ax.set_title(title, fontsize=11)
    ax.set_xlabel(f"{plane.axes[0]} (no unit)", fontsize=9)
    ax.set_ylabel(f"{plane.axes[1]} (no unit)", fontsize=9)
    ax.tick_params(labelsize=8)
    ax.set_aspect("equal")


def _label_and_expert_legend(figure: Any, names: Sequence[str]) -> None:
    handles = [_dot(color, f"label or prediction {k}") for k, color in _LABELS]
    handles.append(_dot("#D9D9D9", "undecided (0.5)"))
    handles += _expert_handles(names, "attributed to {}")
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=10,
        title="Expert panels: opaque where selected, faint where not. Attribution: the experts' "
        "colours mixed by their share",
        title_fontsize=9,
    )


def _expert_handles(names: Sequence[str], text: str) -> list[Any]:
    patches = module("patches")
    return [
        patches.Patch(color=color, label=text.format(name))
        for name, color in zip(names, EXPERTS, strict=False)
    ]


def _dot(color: str, label: str, edge: bool = False) -> Any:
    style = {"markeredgecolor": "white" if edge else color, "markersize": 9 if edge else 7}
    return module("lines").Line2D([], [], ls="", marker="o", color=color, label=label, **style)


def _refuse_many(names: Sequence[str]) -> None:
    if len(names) > len(EXPERTS):
        raise LayoutError(
            f"attribution as a mix of colours works for up to {len(EXPERTS)} experts, got "
            f"{len(names)}; use attribution_bars"
        )


def _rgb(color: str) -> Tensor:
    return torch.tensor([int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)])


def _label_colors(probability: Tensor) -> Tensor:
    """Blue at 0, light grey at 0.5, vermillion at 1: ``(n, 3)``."""
    p = probability.float().cpu()[:, None]
    middle = _rgb("#D9D9D9")
    low = middle + (1 - 2 * p).clamp(0, 1) * (_rgb(BLUE) - middle)
    high = middle + (2 * p - 1).clamp(0, 1) * (_rgb(VERMILLION) - middle)
    return torch.where(p < 0.5, low, high)


def _mix(attribution: Tensor) -> Tensor:
    """The experts' colours, weighted by their shares: ``(n, 3)``."""
    basis = torch.stack([_rgb(color) for color in EXPERTS[: attribution.shape[-1]]])
    return (attribution.float().cpu() @ basis).clamp(0, 1)


# --- MovieLens and skip: attribution, learning, frontier ---------------------------------


def attribution_bars(
    names: Sequence[str],
    mean_attribution: Sequence[float],
    most_attributed_share: Sequence[float],
    path: str | Path,
    paper: Sequence[float] | None = None,
    title: str = "Which features decide?",
) -> None:
    """Figure 6 (and 8): share of samples each expert decides, and its mean attribution.

    Args:
        names: Of the experts.
        mean_attribution: Mean over samples, one per expert, in [0, 1].
        most_attributed_share: Share of samples whose largest attribution is the expert's.
        path: Where to write the PNG.
        paper: The paper's most-attributed shares, drawn beside ours.
        title: First line of the figure.

    Raises:
        LayoutError: Lengths that differ.
        BackendError: matplotlib is missing.
    """
    series = {"mean_attribution": mean_attribution, "most_attributed_share": most_attributed_share}
    for argument, values in {**series, "paper": paper or names}.items():
        if len(values) != len(names):
            raise LayoutError(f"{argument} must hold {len(names)} values, got {len(values)}")
    figure = canvas(8.0, 2.1 + (0.62 if paper is None else 0.85) * len(names))
    ax = figure.subplots()
    at = torch.arange(len(names)).float()
    shown = [
        (most_attributed_share, BLUE, "samples this expert decides (largest attribution)"),
        (mean_attribution, ORANGE, "mean attribution over all samples"),
    ]
    if paper is not None:
        shown.insert(1, (paper, GREY, "samples it decides in the paper"))
    step = 0.78 / len(shown)
    for k, (values, color, label) in enumerate(shown):
        places = (at + (k - (len(shown) - 1) / 2) * step).numpy()
        percent = [100 * value for value in values]
        bars = ax.barh(places, percent, 0.92 * step, color=color, label=label)
        ax.bar_label(bars, fmt="%.1f %%", padding=4, fontsize=9)
    ax.set_yticks(at.numpy(), [wrap(name, 22) for name in names], fontsize=10)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.16 * 100 * max([*mean_attribution, *most_attributed_share, *(paper or [])]))
    ax.set_xlabel("share (%)")
    ax.set_ylabel("expert")
    light_grid(ax, "x")
    figure.suptitle(f"{title}\nHow much of the answers rests on each expert", fontsize=13)
    figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=10)
    save(figure, path)


History = Mapping[str, Sequence[float]] | Sequence[Mapping[str, float]]


_METRICS = ("accuracy", "acc", "maa", "metric")


def learning_curves(
    curves: Mapping[str, History],
    path: str | Path,
    monitor: str = "NDCG@10",
    title: str = "Learning curves",
) -> None:
    """Training loss and validation metrics per epoch; the kept epoch of each model is marked.

    Args:
        curves: Model name to its history: column name to one value per epoch, or one record
            per epoch. Columns that end in ``loss`` go into the first panel, those with an ``@``
            or named ``accuracy``, ``acc``, ``maa`` or ``metric`` into panels of their own; others
            are not drawn.
        path: Where to write the PNG.
        monitor: Column whose largest value names the kept epoch; the first metric where a
            model has no such column.
        title: First line of the figure.

    Raises:
        LayoutError: No model, or no epoch at all.
        BackendError: matplotlib is missing.
    """
    tables = {name: _columns(history) for name, history in curves.items()}
    columns = list(dict.fromkeys(key for table in tables.values() for key in table))
    metrics = [key for key in columns if "@" in key or key.lower() in _METRICS]
    losses = [key for key in columns if key.endswith("loss")]
    if not losses + metrics:
        raise LayoutError(f"nothing to draw: no loss or metric among the columns {columns}")
    panels = [losses] * bool(losses) + [[metric] for metric in metrics]
    figure = canvas(1.2 + 4.4 * len(panels), 4.6 + 0.2 * len(tables))
    for ax, keys in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _curves_panel(ax, tables, keys, monitor)
    handles, labels = [], []
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    star = {"marker": "*", "ms": 14, "mfc": "white", "mec": BLACK, "ls": ""}
    handles.append(module("lines").Line2D([], [], label="kept epoch", **star))
    figure.suptitle(f"{title}\nThe starred epoch is the one whose weights are kept", fontsize=13)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    save(figure, path)


def _columns(history: History) -> dict[str, list[float]]:
    if isinstance(history, Mapping):
        return {name: list(values) for name, values in history.items()}
    names = dict.fromkeys(name for record in history for name in record)
    return {name: [record[name] for record in history] for name in names}


def _curves_panel(
    ax: Any, tables: Mapping[str, Mapping[str, Sequence[float]]], keys: Sequence[str], monitor: str
) -> None:
    for m, (name, table) in enumerate(tables.items()):
        color, marker = CURVES[m % len(CURVES)], MARKERS[m % len(MARKERS)]
        for k, key in enumerate(key for key in keys if key in table):
            values = table[key]
            label = name if len(keys) == 1 else f"{name}, {key.replace('_', ' ')}"
            style = {"color": color, "marker": marker, "ms": 4, "ls": ("-", "--", ":")[k % 3]}
            epochs = range(1, len(values) + 1)
            ax.plot(epochs, values, label=label if len(keys) > 1 else name, **style)
            kept = _kept_epoch(table, monitor)
            if kept is not None and kept < len(values):
                star = {"marker": "*", "ms": 15, "mfc": color, "mec": BLACK, "zorder": 4}
                ax.plot(kept + 1, values[kept], **star)
    loss = keys[0].endswith("loss")
    name = "loss" if len(keys) > 1 else keys[0].replace("_", " ")
    ax.set_title(f"{name}: {'lower' if loss else 'higher'} is better", fontsize=11)
    ax.set_ylabel("loss (nats)" if loss else f"{name}, validation (0 to 1)")
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(module("ticker").MaxNLocator(integer=True))
    light_grid(ax, "both")


def _kept_epoch(table: Mapping[str, Sequence[float]], monitor: str) -> int | None:
    key = monitor if monitor in table else next((key for key in table if "@" in key), None)
    if key is None or not table[key]:
        return None
    return max(range(len(table[key])), key=table[key].__getitem__)


def frontier(
    points: Sequence[Mapping[str, Any]],
    chosen: float,
    path: str | Path,
    black_box: Mapping[str, float] | None = None,
    title: str = "What does a simple explanation cost?",
) -> None:
    """HR@10 and NDCG@10 against the share of items each expert decides, over sharpness.

    Args:
        points: One per sharpness: ``{"sharpness", "hr", "ndcg", "decided": {expert: share}}``,
            the largest expert last in ``decided``.
        chosen: Sharpness of the chosen point.
        path: Where to write the PNG.
        black_box: ``{"hr", "ndcg"}`` of the black box, drawn as levels.
        title: First line of the figure.

    Raises:
        LayoutError: No points, or ``chosen`` is not the sharpness of one.
        BackendError: matplotlib is missing.
    """
    points = sorted(points, key=lambda point: float(point["sharpness"]))
    sharpness = [float(point["sharpness"]) for point in points]
    if not points or chosen not in sharpness:
        raise LayoutError(f"chosen must be the sharpness of a point, one of {sharpness}: {chosen}")
    figure = canvas(12.5, 6.0)
    left, middle, right = figure.subplots(1, 3)
    largest = list(points[0]["decided"])[-1]
    at = sharpness.index(chosen)
    for ax, key, name in ((left, "hr", "HR@10"), (middle, "ndcg", "NDCG@10")):
        _frontier_panel(ax, points, key, at, largest)
        if black_box is not None:
            ax.axhline(black_box[key], color=BLACK, ls="--", lw=1.2, label="black box")
        ax.set_ylabel(f"{name} (0 to 1)")
        ax.set_title(f"{name}: higher is better", fontsize=11)
    _decided_panel(right, points, at)
    figure.suptitle(
        f"{title}\nFurther right, {largest!r} decides more items; further left, smaller experts do",
        fontsize=13,
    )
    handles, labels = left.get_legend_handles_labels()
    more = right.get_legend_handles_labels()
    figure.legend(
        [*handles, *more[0]],
        [*labels, *more[1]],
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=10,
    )
    save(figure, path)


def _frontier_panel(
    ax: Any, points: Sequence[Mapping[str, Any]], key: str, chosen: int, largest: str
) -> None:
    x = [100 * point["decided"][largest] for point in points]
    y = [point[key] for point in points]
    ax.plot(x, y, color=BLUE, marker="o", ms=4, label="mixture, by sharpness")
    for k, marker, end in ((0, "s", "lower"), (len(points) - 1, "D", "upper")):
        name = f"{end} end: sharpness {points[k]['sharpness']:g}"
        style = {"marker": marker, "ms": 9, "mfc": "white", "mec": BLACK, "mew": 1.5, "ls": ""}
        ax.plot(x[k], y[k], label=name, **style)
    star = {"marker": "*", "ms": 19, "color": VERMILLION, "mec": BLACK, "ls": "", "zorder": 5}
    ax.plot(
        x[chosen], y[chosen], label=f"chosen: sharpness {points[chosen]['sharpness']:g}", **star
    )
    ax.set_xlabel(f"items decided by {largest!r} (%)")
    ax.margins(0.12)
    light_grid(ax, "both")


def _decided_panel(ax: Any, points: Sequence[Mapping[str, Any]], chosen: int) -> None:
    x = [float(point["sharpness"]) for point in points]
    experts = list(points[0]["decided"])
    for k, expert in enumerate(experts):
        y = [100 * point["decided"][expert] for point in points]
        marker = {"marker": MARKERS[(k + 1) % len(MARKERS)], "ms": 5}
        others = (SKY, PURPLE, GREEN, ORANGE, BLUE, GREY)
        color = BLACK if k == len(experts) - 1 else others[k % len(others)]
        ax.plot(x, y, color=color, label=f"decided by {expert}", **marker)
    ax.axvline(x[chosen], color=VERMILLION, lw=1.5, zorder=0, label="chosen (line)")
    if min(x) > 0 and max(x) / min(x) > 4:
        ax.set_xscale("log", base=2)
        labelled = [x[0]]  # on a log axis neighbours closer than this would overlap
        for value in x[1:]:
            if value / labelled[-1] >= 1.45:
                labelled.append(value)
        ax.set_xticks(labelled, [f"{value:g}" for value in labelled])
        ax.minorticks_off()
    ax.set_xlabel("sharpness (no unit)")
    ax.set_ylabel("items decided (%)")
    ax.set_title("Who decides", fontsize=11)
    ax.set_ylim(bottom=0)
    light_grid(ax, "both")


# --- Hasse diagram -----------------------------------------------------------------------


@dataclass
class _Node:
    """A box of the diagram; sizes in inches."""

    name: str
    groups: str
    x: float = 0.0
    y: float = 0.0
    width: float = 0.0
    height: float = 0.0


_CHARACTER = 0.082  # inches; a wide guess for 9 point text
_TEXT_LINE = 0.165
_GAP = 0.12
_TALLEST = 13.0  # a rank is split into columns beyond this, for edges then run behind boxes
_TALLEST_ALONE = 8.0  # without edges
_HEADING = 0.95


def hasse(
    family: SubsetFamily, path: str | Path, title: str = "The experts and what they see"
) -> None:
    """Hasse diagram of a family, by rank from left to right; lines join nearest inclusions.

    Args:
        family: Up to 64 experts.
        path: Where to write the PNG.
        title: First line of the figure.

    Raises:
        LayoutError: More experts than a page can show.
        BackendError: matplotlib is missing.
    """
    if family.num_experts > MAX_HASSE:
        raise LayoutError(
            f"a Hasse diagram stays readable up to {MAX_HASSE} experts, this family has "
            f"{family.num_experts}; draw a family of fewer subsets, or print draw_layout"
        )
    nodes = {name: _node(name, groups) for name, groups in family.subsets.items()}
    edges = family.hasse_edges()
    width, height, paths, heads = _place(nodes, family, edges)
    margin = max(0.0, 6.4 - width) / 2
    low, high, width = -margin, width + margin, width + 2 * margin
    page = height + _HEADING
    figure = canvas(width, page, constrained=False)
    ax = figure.add_axes((0, 0, 1, height / page))
    ax.set_xlim(low, high)
    ax.set_ylim(0, height)
    ax.axis("off")
    _draw_hasse(ax, [node for node in nodes.values() if node.name], paths, heads)
    line = "A line joins nearest subsets: the one on the left lies inside the one on the right"
    figure.text(0.5, 1 - 0.18 / page, title, ha="center", va="top", fontsize=14)
    figure.text(
        0.5,
        1 - 0.5 / page,
        "\n".join(textwrap.wrap(line, int(width / 0.074))),
        ha="center",
        va="top",
        fontsize=10,
        color="#444444",
    )
    save(figure, path)


def _node(name: str, groups: Sequence[str]) -> _Node:
    seen = ", ".join(groups) if groups else "(no input)"
    # Where the name lists the groups already, once is enough.
    text = "" if "+".join(groups) == name else "\n".join(textwrap.wrap(seen, 30))
    node = _Node("\n".join(textwrap.wrap(name, 30)), text)
    lines = [*node.name.split("\n"), *(text.split("\n") if text else [])]
    node.width = 0.24 + _CHARACTER * max(map(len, lines))
    node.height = 0.16 + _TEXT_LINE * len(lines)
    return node


def _place(
    nodes: dict[str, _Node], family: SubsetFamily, edges: Sequence[tuple[str, str]]
) -> tuple[float, float, list[list[_Node]], list[tuple[float, str]]]:
    """Give every node its place; size of the page, a path per edge, a heading per rank."""
    rank = dict(zip(family.names, family.rank().tolist(), strict=True))
    ranks = [[n for n in family.names if rank[n] == r] for r in range(max(rank.values()) + 1)]
    paths, steps = _bend_long_edges(nodes, ranks, rank, edges)
    _untangle(ranks, steps)
    limit = _TALLEST if edges else _TALLEST_ALONE
    columns = [
        (r, column) for r, names in enumerate(ranks) for column in _split(names, nodes, limit)
    ]
    tall = max(sum(nodes[n].height + _GAP for n in column) for _, column in columns) + _GAP
    heads: list[tuple[float, str]] = []
    x = 0.3
    for k, (r, column) in enumerate(columns):
        wide = max(nodes[n].width for n in column)
        space = (tall - sum(nodes[n].height for n in column)) / (len(column) + 1)
        y = tall + 0.45
        for n in column:
            y -= space + nodes[n].height
            nodes[n].x, nodes[n].y = x + wide / 2, y + nodes[n].height / 2
            if not nodes[n].name:
                nodes[n].width = wide  # pass the whole column in a straight line
        if k == 0 or columns[k - 1][0] != r:
            heads.append((x + wide / 2, f"rank {r}"))
        last_of_rank = k + 1 == len(columns) or columns[k + 1][0] != r
        x += wide + (1.1 if last_of_rank else 0.35)
    return x - 0.8, tall + 0.5, paths, heads


def _bend_long_edges(
    nodes: dict[str, _Node],
    ranks: list[list[str]],
    rank: Mapping[str, int],
    edges: Sequence[tuple[str, str]],
) -> tuple[list[list[_Node]], list[tuple[str, str]]]:
    """Reserve room in every rank an edge passes: paths of nodes, and edges between neighbours."""
    paths: list[list[_Node]] = []
    steps: list[tuple[str, str]] = []
    for e, (small, large) in enumerate(edges):
        names = [small]
        for r in range(rank[small] + 1, rank[large]):
            name = f"\0{e}/{r}"  # no expert is called so
            nodes[name] = _Node("", "", height=0.05)
            ranks[r].append(name)
            names.append(name)
        names.append(large)
        paths.append([nodes[name] for name in names])
        steps += itertools.pairwise(names)
    return paths, steps


def _split(names: Sequence[str], nodes: Mapping[str, _Node], limit: float) -> list[list[str]]:
    """Columns of a rank, as even as may be, none taller than the limit."""
    total = sum(nodes[name].height + _GAP for name in names)
    each = -(-len(names) // max(1, math.ceil(total / limit)))
    return [list(names[k : k + each]) for k in range(0, len(names), each)]


def _untangle(ranks: list[list[str]], edges: Sequence[tuple[str, str]]) -> None:
    """Order each rank by the mean place of its neighbours: few crossings after some sweeps."""
    near: dict[str, list[str]] = {name: [] for names in ranks for name in names}
    for small, large in edges:
        near[small].append(large)
        near[large].append(small)
    place = {name: k / len(names) for names in ranks for k, name in enumerate(names)}
    for _ in range(6):
        for names in ranks:
            mean = {
                n: sum(place[m] for m in near[n]) / len(near[n]) if near[n] else place[n]
                for n in names
            }
            names.sort(key=mean.__getitem__)
            place.update({name: (k + 0.5) / len(names) for k, name in enumerate(names)})


def _draw_hasse(
    ax: Any,
    nodes: Sequence[_Node],
    paths: Sequence[Sequence[_Node]],
    heads: Sequence[tuple[float, str]],
) -> None:
    patches = module("patches")
    for path in paths:
        # Leave each node on its right and enter it on its left.
        x = [node.x + side * node.width / 2 for node in path for side in (-1, 1)][1:-1]
        y = [node.y for node in path for _ in range(2)][1:-1]
        ax.plot(x, y, color=SKY, lw=1.1, zorder=1)
    for node in nodes:
        corner = (node.x - node.width / 2, node.y - node.height / 2)
        style = {"boxstyle": "round,pad=0,rounding_size=0.06", "fc": "white", "ec": BLUE}
        ax.add_patch(
            patches.FancyBboxPatch(corner, node.width, node.height, lw=1.1, zorder=2, **style)
        )
        lines = node.name.count("\n") + 1
        top = node.y + node.height / 2 - 0.08
        text = {"ha": "center", "va": "top", "fontsize": 9, "zorder": 3, "linespacing": 1.25}
        ax.text(node.x, top, node.name, fontweight="bold", color=BLACK, **text)
        ax.text(node.x, top - _TEXT_LINE * lines, node.groups, color="#444444", **text)
    for at, heading in heads:
        ax.text(at, 0.12, heading, ha="center", va="bottom", fontsize=9, color="#666666")


# --- Common ------------------------------------------------------------------------------


def module(name: str) -> Any:
    """A module of matplotlib.

    Raises:
        BackendError: matplotlib is missing.
    """
    reason = obstacle()
    if reason is not None:
        raise BackendError(reason)
    return importlib.import_module(f"matplotlib.{name}")


def canvas(width: float, height: float, constrained: bool = True) -> Any:
    """A figure of that many inches, bound to no window and no global state."""
    layout = "constrained" if constrained else None
    figure = module("figure").Figure(figsize=(width, height), layout=layout, facecolor="white")
    if constrained:
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.1)
    return figure


def save(figure: Any, path: str | Path) -> None:
    """Write a figure as PNG; see :func:`replacing` for what is guaranteed."""
    module("backends.backend_agg").FigureCanvasAgg(figure)
    with replacing(path) as file:
        figure.savefig(file, dpi=DPI, format="png")


def light_grid(ax: Any, axis: str) -> None:
    """A pale grid along ``"x"``, ``"y"`` or ``"both"``, and no frame above or at the right."""
    ax.grid(axis=axis, color="#DDDDDD", lw=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def wrap(text: str, width: int) -> str:
    """Text in lines of at most ``width`` characters; a line may also end after a ``+``."""
    lines = textwrap.wrap(text.replace("+", "+ "), width + 2)
    return "\n".join(line.replace("+ ", "+") for line in lines) or text
