"""Hasse diagrams of families of subsets; written as PNG, atomically."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.experiments.shared.plot_style import BLACK, BLUE, SKY, canvas, module, save
from maskmoe_kernels.layout.subsets import SubsetFamily

MAX_HASSE = 64


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
_TALLEST = 13.0  # a taller rank is split into columns, and edges run behind boxes
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
    line = (
        "A line joins nearest subsets: the one on the left lies inside the one on the right"
        if edges
        else "No subset lies inside another"
    )
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
    """Add a node in every rank that an edge passes; paths of nodes, and edges between ranks."""
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
