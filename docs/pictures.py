"""Draws the pictures of the pages: ``python docs/pictures.py``.

They are committed beside it, so that the pages show them on every host of the repository, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

import maskmoe_kernels as mk
from maskmoe_kernels.estimators.plots import waterfall
from maskmoe_kernels.experiments.shared import plot_style as style
from maskmoe_kernels.experiments.shared.hasse import hasse

PICTURES = Path(__file__).resolve().parent / "pictures"
GROUPS = {"content": 2, "user": 4, "item": 4}
SUBSETS = {
    "content": ["content"],
    "user": ["content", "user"],
    "item": ["content", "item"],
    "all": ["content", "user", "item"],
}
FAMILY = mk.SubsetFamily(GROUPS, SUBSETS)
ROUTED, STOPPED = style.BLUE, "#A9CBE3"


def draw_blocks(ax: Any, layout: mk.BlockLayout, columns: list[str], title: str) -> None:
    """Blocks of a layer, in the proportions of their widths."""
    patches = style.module("patches")
    sizes = (layout.row_sizes, layout.col_sizes)
    rows, cols = (torch.tensor([0, *each]).cumsum(0).tolist() for each in sizes)
    for i, name in enumerate(FAMILY.names):
        for j in range(len(columns)):
            if layout.present[i, j]:
                colour = ROUTED if layout.routes_grad[i, j] else STOPPED
                corner, size = (cols[j], rows[i]), (layout.col_sizes[j], layout.row_sizes[i])
                ax.add_patch(patches.Rectangle(corner, *size, fc=colour, ec="white", lw=2))
        ax.text(-0.3, (rows[i] + rows[i + 1]) / 2, name, ha="right", va="center", fontsize=10)
    for j, name in enumerate(columns):
        ax.text((cols[j] + cols[j + 1]) / 2, -0.25, name, ha="center", va="bottom", fontsize=10)
    for at in cols:
        ax.plot([at, at], [0, rows[-1]], color="#DDDDDD", lw=0.8, zorder=0)
    for at in rows:
        ax.plot([0, cols[-1]], [at, at], color="#DDDDDD", lw=0.8, zorder=0)
    ax.set_xlim(-0.1, cols[-1] + 0.1)
    ax.set_ylim(rows[-1] + 0.1, -0.1)
    ax.set_title(title, fontsize=11, pad=24)
    ax.axis("off")


def blocks() -> Any:
    """Which blocks of an input layer and of a hidden layer exist, and through which one learns."""
    figure = style.canvas(8.4, 3.9)
    first, second = figure.subplots(1, 2)
    draw_blocks(first, FAMILY.input_layout(2), [*GROUPS], "Input layer: experts read their groups")
    draw_blocks(
        second, FAMILY.hidden_layout(2, 2), FAMILY.names, "Hidden layer: experts read their subsets"
    )
    patches = style.module("patches")
    figure.legend(
        handles=[
            patches.Patch(fc=ROUTED, label="present, gradient to the input routed"),
            patches.Patch(fc=STOPPED, label="present, gradient stopped"),
            patches.Patch(fc="white", ec="#DDDDDD", label="absent: not stored, not multiplied"),
        ],
        loc="outside lower center", ncols=3, fontsize=9, frameon=False,
    )  # fmt: skip
    return figure


PAIR = mk.SubsetFamily({"x1": 1, "x2": 1}, {"x1": ["x1"], "x2": ["x2"], "both": ["x1", "x2"]})
Z = torch.linspace(0, 3, 121)


def shares(own: torch.Tensor, sharpness: float) -> torch.Tensor:
    """Attribution where the expert of x1 has the logit ``own``, x2's 0.2 and the large one 2."""
    logits = torch.stack([own, torch.full_like(own, 0.2), torch.full_like(own, 2.0)], -1)
    return mk.mixture(logits, PAIR, sharpness=sharpness).attribution


def selection() -> Any:
    """Who decides, as the small expert grows sure."""
    figure = style.canvas(8.4, 3.4)
    for ax, sharpness in zip(figure.subplots(1, 2, sharey=True), (1.0, 4.0), strict=True):
        parts = shares(Z, sharpness).T
        ax.stackplot(Z, *parts, colors=[style.GREEN, style.PURPLE, style.GREY], labels=PAIR.names)
        ax.set_title(f"sharpness {sharpness:g}", fontsize=11)
        ax.set_xlabel("logit of the expert that sees x1")
        ax.set_xlim(0, 3)
        ax.set_ylim(0, 1)
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("attribution")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, [f"expert {name}" for name in labels],
        loc="outside lower center", ncols=3, fontsize=9, frameon=False,
    )  # fmt: skip
    return figure


def row() -> Any:
    """What ``explain(frame).plot(1)`` of estimators.md draws, from the numbers that it printed."""
    steps = {"town = Rome": 2.52, "age = 38": 0.307, "income = 47.7325": -0.266}
    title = "92.2% for yes; sufficient: age and town"
    values = np.array([*steps.values()])
    return waterfall([*steps], values, -0.1, "log-odds of yes", title, None, 10).figure


def main() -> None:
    """Draw them all."""
    PICTURES.mkdir(exist_ok=True)
    style.save(blocks(), PICTURES / "blocks.png")
    style.save(selection(), PICTURES / "selection.png")
    hasse(FAMILY, PICTURES / "hasse.png")
    style.save(row(), PICTURES / "row.png")


if __name__ == "__main__":
    main()
