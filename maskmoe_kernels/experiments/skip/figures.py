"""Figures of skip prediction: subsets, who decides, who ought to, one session, learning curves.

Every function that draws writes a PNG atomically; what they share is in :mod:`.plot_style`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from maskmoe_kernels.experiments.shared import charts, plot_style
from maskmoe_kernels.experiments.shared.plot_style import BLUE, GREY, ORANGE
from maskmoe_kernels.experiments.skip.data.causes import CAUSE_GROUPS
from maskmoe_kernels.layout.subsets import SubsetFamily

_DARK, _PALE = "#333333", "#EFEFEF"
_SHARES = "Blues"


def draw(report: Mapping[str, Any], out: Path) -> str | None:
    """All figures of an evaluation, as png files in ``out``.

    Returns:
        Why there are none, in words; ``None`` where they were drawn.
    """
    missing = plot_style.unsupported_reason()
    if missing is not None:
        return missing
    models = report["models"]
    experts = {name: row for name, row in models.items() if "decided" in row}
    for number, (name, row) in enumerate(experts.items()):
        if number == 0:
            subsets(SubsetFamily(**row["family"]), out / "subsets.png")
        # One folder may hold several models' figures.
        mark = name.replace("/", "_").strip("_.")
        charts.attribution_bars(
            list(row["decided"]),
            list(row["mean_attribution"].values()),
            list(row["decided"].values()),
            out / f"attribution-{mark}.png",
            title=f"Which features decide? {name}",
        )
        if "decisive" in row:
            causes(row["decisive"], SubsetFamily(**row["family"]), out / f"causes-{mark}.png", name)
    histories = {name: row["history"] for name, row in models.items() if "history" in row}
    return draw_curves(histories, out) if histories else None


def draw_curves(histories: Mapping[str, Any], out: Path) -> str | None:
    """Learning curves, ``learning_curves.png`` in ``out``; returns as :func:`draw`."""
    missing = plot_style.unsupported_reason()
    if missing is None:
        charts.learning_curves(histories, out / "learning_curves.png", "Acc")
    return missing


def subsets(family: SubsetFamily, path: Path, title: str = "What each expert sees") -> None:
    """Figure 7: groups by expert, a cell is full where the expert sees the group."""
    figure = plot_style.canvas(2.6 + 0.95 * family.num_experts, 2.3 + 0.5 * family.num_groups)
    ax = figure.subplots()
    seen = family.membership.T.cpu()
    for n, row in enumerate(seen.tolist()):
        for i, full in enumerate(row):
            ax.add_patch(_cell(i, n, BLUE if full else _PALE))
    _grid_axes(ax, family.num_experts, family.num_groups)
    ax.set_xticks(range(family.num_experts), _names(family.names), fontsize=9)
    groups = [f"{name} ({width})" for name, width in family.groups.items()]
    ax.set_yticks(range(family.num_groups), groups, fontsize=10)
    ax.set_xlabel("expert")
    ax.set_ylabel("group (features)")
    ax.legend(
        handles=[_patch(BLUE, "seen"), _patch(_PALE, "not seen")],
        loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False,
    )  # fmt: skip
    figure.suptitle(title, fontsize=13)
    plot_style.save(figure, path)


def causes(decisive: Mapping[str, Any], family: SubsetFamily, path: Path, model: str) -> None:
    """Who decides the tracks of each known cause: causes by experts, in per cent.

    Args:
        decisive: As :class:`Deciders` reports it.
        family: Of the experts.
        path: Where to write the PNG.
        model: Its name.
    """
    rows = decisive["causes"]
    figure = plot_style.canvas(3.6 + 1.0 * family.num_experts, 2.7 + 0.56 * len(rows))
    ax = figure.subplots()
    colors = _colors()
    for n, (name, row) in enumerate(rows.items()):
        needed = CAUSE_GROUPS[name]
        for i, (expert, share) in enumerate(row["decided"].items()):
            ax.add_patch(_cell(i, n, colors(0.9 * share)))
            if needed <= set(family.subsets[expert]):
                ax.add_patch(_cell(i, n, "none", edge=ORANGE, inset=0.06, lw=2))
            text = f"{100 * share:.0f}" if share >= 0.005 else ""
            ax.text(i, n, text, ha="center", va="center", fontsize=10, color=_ink(share))
    _grid_axes(ax, family.num_experts, len(rows))
    ax.set_xticks(range(family.num_experts), _names(family.names), fontsize=9)
    labels = [f"{name}\n{row['tracks']:,} tracks" for name, row in rows.items()]
    ax.set_yticks(range(len(rows)), labels, fontsize=9)
    ax.set_xlabel("most attributed expert (% of the cause's tracks)")
    ax.set_ylabel("cause")
    frame = _patch("none", "sees all groups of the cause", ORANGE)
    figure.legend(handles=[frame], loc="outside lower center", frameon=False, fontsize=10)
    figure.suptitle(
        f"Who decides when the cause is known? {model}\n"
        f"{decisive['sees']:.1%} see it, {decisive['smallest']:.1%} are the smallest that do",
        fontsize=13,
    )
    plot_style.save(figure, path)


def session(
    attribution: Tensor,
    names: Sequence[str],
    positions: Sequence[int],
    labels: Sequence[bool],
    probability: Sequence[float],
    path: Path,
    title: str,
) -> None:
    """Figure 11: one session, experts by tracks of its second half, and how it was judged.

    Args:
        attribution: Share of each expert, ``(tracks, H)``.
        names: Of the experts.
        positions: Of the tracks in the session, from 1.
        labels: Was the track skipped?
        probability: Of a skip, as predicted.
        path: Where to write the PNG.
        title: First line of the figure.
    """
    tracks, experts = len(positions), len(names)
    figure = plot_style.canvas(3.9 + 0.78 * max(tracks, 5), 3.1 + 0.42 * (experts + 2))
    top, ax = figure.subplots(2, 1, height_ratios=[2, experts], sharex=True)
    for t in range(tracks):
        for row, skipped in enumerate((labels[t], probability[t] > 0.5)):
            top.add_patch(_cell(t, row, ORANGE if skipped else _PALE))
        sure = f"{100 * probability[t]:.0f} %"
        top.text(t, 0, "skip" if labels[t] else "play", ha="center", va="center", fontsize=9)
        wrong = labels[t] != (probability[t] > 0.5)
        weight, color = ("bold", "#B00020") if wrong else ("normal", "black")
        top.text(t, 1, sure, ha="center", va="center", fontsize=9, color=color, fontweight=weight)
        if wrong:
            top.add_patch(_cell(t, 1, "none", edge=color, inset=0.05, lw=2))
    _grid_axes(top, tracks, 2)
    top.set_yticks([0, 1], ["label", "predicted skip"], fontsize=9)
    top.tick_params(labelbottom=False)
    colors = _colors()
    for t, shares in enumerate(attribution.tolist()):
        most = max(range(experts), key=shares.__getitem__)
        for i, share in enumerate(shares):
            ax.add_patch(_cell(t, i, colors(0.9 * share)))
            text = f"{100 * share:.0f}" if share >= 0.005 else ""
            bold = "bold" if i == most else "normal"
            ax.text(
                t, i, text, ha="center", va="center", fontsize=9, color=_ink(share), fontweight=bold
            )
    _grid_axes(ax, tracks, experts)
    ax.set_yticks(range(experts), [plot_style.wrap(name, 24) for name in names], fontsize=9)
    ax.set_xticks(range(tracks), [str(p) for p in positions], fontsize=10)
    ax.set_xlabel("track of the session")
    ax.set_ylabel("expert: share of the decision (%)")
    handles = [
        _patch(ORANGE, "skipped"), _patch(_PALE, "played"), _patch(colors(0.9), "decides alone"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(f"{title}\nFramed predictions are wrong", fontsize=12)
    plot_style.save(figure, path)


# --- Grids -------------------------------------------------------------------------------


def _cell(
    x: int, y: int, face: Any, edge: str = "white", inset: float = 0.0, lw: float = 1.5
) -> Any:
    size = 1 - 2 * inset
    corner = (x - size / 2, y - size / 2)
    return plot_style.module("patches").Rectangle(corner, size, size, fc=face, ec=edge, lw=lw)


def _patch(color: Any, label: str, edge: str = GREY) -> Any:
    return plot_style.module("patches").Patch(fc=color, ec=edge, label=label)


def _colors() -> Any:
    return plot_style.module("cm").ScalarMappable(cmap=_SHARES).get_cmap()


def _ink(share: float) -> str:
    return "white" if share > 0.55 else _DARK


def _names(names: Sequence[str]) -> list[str]:
    """Names of experts in narrow columns: a group a line."""
    return [name.replace("+", "+\n") for name in names]


def _grid_axes(ax: Any, columns: int, rows: int) -> None:
    ax.set_xlim(-0.5, columns - 0.5)
    ax.set_ylim(rows - 0.5, -0.5)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
