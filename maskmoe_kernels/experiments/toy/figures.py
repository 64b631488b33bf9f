"""Figures of the toy tasks: panels by expert, and attribution over the plane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.experiments.shared.hasse import hasse
from maskmoe_kernels.experiments.shared.plot_style import (
    BLUE,
    EXPERTS,
    VERMILLION,
    canvas,
    module,
    save,
)
from maskmoe_kernels.experiments.toy.data import SIGMA, ToyTask, held_out
from maskmoe_kernels.experiments.toy.evaluate import explained
from maskmoe_kernels.models import InterpretableMLP
from maskmoe_kernels.ops.selection import Mixture


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


@torch.no_grad()
def draw_figures(net: InterpretableMLP, task: ToyTask, rule: str, out: Path, seed: int = 0) -> None:
    """Figure 5 (``panels.png``), ``plane.png`` and ``hasse.png`` of a trained net, in ``out``."""
    samples = partial(_sampled_plane, net, task, rule, seed)
    lattice = partial(_lattice_plane, net, task, rule)
    names = task.family.names
    about = f"Toy ({task.name}): {task.title}"
    planes = [samples(axes) for axes in task.planes]
    toy_panels(planes, names, out / "panels.png", title=about)
    toy_plane([lattice(axes) for axes in task.planes], names, out / "plane.png", about)
    hasse(task.family, out / "hasse.png")


def _sampled_plane(
    net: InterpretableMLP, task: ToyTask, rule: str, seed: int, axes: tuple[int, int]
) -> Plane:
    x, y, which = held_out(task, 6000, seed)
    lies = torch.tensor([cluster.noisy == axes for cluster in task.clusters])[which]
    return _plane(net, task, rule, axes, x[lies], y[lies])


def _lattice_plane(
    net: InterpretableMLP, task: ToyTask, rule: str, axes: tuple[int, int], side: int = 240
) -> Plane:
    # Inputs off the plane are zero, as they are in the samples.
    centers = torch.tensor([c.center for c in task.clusters if c.noisy == axes])[:, list(axes)]
    labels = torch.tensor([float(c.label) for c in task.clusters if c.noisy == axes])
    reach = float(centers.abs().max()) + 4 * SIGMA
    line = torch.linspace(-reach, reach, side)
    x = torch.zeros(side * side, len(task.clusters[0].center))
    x[:, list(axes)] = torch.cartesian_prod(line, line)
    plane = _plane(net, task, rule, axes, x, torch.full((len(x),), float("nan")))
    return replace(plane, centers=centers, center_labels=labels)


def _plane(
    net: InterpretableMLP,
    task: ToyTask,
    rule: str,
    axes: tuple[int, int],
    x: Tensor,
    y: Tensor,
) -> Plane:
    logits = net(x.to(next(net.parameters()).device)).cpu()
    groups = list(task.family.groups)
    return Plane(
        axes=(groups[axes[0]], groups[axes[1]]),
        points=x[:, list(axes)],
        labels=y,
        experts=torch.sigmoid(2 * logits),
        mixture=explained(logits, task.family, rule),
    )


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
    figure.get_layout_engine().set(hspace=0.1)  # a label of an axis is above a title
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
    shown.append(("Attribution", mixed_colours(plane.mixture.attribution), opaque))
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
        image = mixed_colours(plane.mixture.attribution).view(side, side, 3).transpose(0, 1).numpy()
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
        *expert_handles(names, "attributed to {}"),
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
    handles += expert_handles(names, "attributed to {}")
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


def expert_handles(names: Sequence[str], text: str) -> list[Any]:
    """Entries of a legend: each expert's colour and ``text`` with its name."""
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


def mixed_colours(attribution: Tensor) -> Tensor:
    """The experts' colours, weighted by their shares: ``(n, 3)``."""
    basis = torch.stack([_rgb(color) for color in EXPERTS[: attribution.shape[-1]]])
    return (attribution.float().cpu() @ basis).clamp(0, 1)
