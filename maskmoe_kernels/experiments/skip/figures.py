"""Figures of skip prediction: subsets, deciding experts, causes, one session, learning curves.

Every function that draws writes a PNG file, with the guarantees of :func:`replacing`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from maskmoe_kernels.experiments.shared import charts, plot_style
from maskmoe_kernels.experiments.shared.plot_style import BLUE, GREY, ORANGE
from maskmoe_kernels.layout.subsets import SubsetFamily

_DARK, _PALE = "#333333", "#EFEFEF"
_SHARES = "Blues"


def draw(report: Mapping[str, Any], out: Path) -> str | None:
    """Draw all figures of an evaluation.

    Args:
        report: From :func:`evaluate`.
        out: The folder for the PNG files.

    Returns:
        Why no figure was drawn, in words; ``None`` if they were drawn.
    """
    missing = plot_style.unsupported_reason()
    if missing is not None:
        return missing
    models = report["models"]
    experts = {name: row for name, row in models.items() if "decided" in row}
    for number, (name, row) in enumerate(experts.items()):
        if number == 0:
            subsets(SubsetFamily(**row["family"]), out / "subsets.png")
        # A model may be named by its folder; a file name must not contain its separators.
        file_name = name.replace("/", "_").strip("_.")
        charts.attribution_bars(
            list(row["decided"]),
            list(row["mean_attribution"].values()),
            list(row["decided"].values()),
            out / f"attribution-{file_name}.png",
            title=f"Which features decide? {name}",
        )
        if "decisive" in row:
            path = out / f"causes-{file_name}.png"
            causes(row["decisive"], SubsetFamily(**row["family"]), path, name)
    histories = {name: row["history"] for name, row in models.items() if "history" in row}
    kinds = {name: models[name].get("model", name) for name in histories}
    return draw_curves(histories, out, kinds) if histories else "no trained model was named"


def draw_curves(
    histories: Mapping[str, Any], out: Path, kinds: Mapping[str, str] | None = None
) -> str | None:
    """Draw ``learning_curves.png``.

    Args:
        histories: Model -> the history of its run.
        out: The folder for the file.
        kinds: Model -> which of ``MODELS`` it is; ``None``: it is named so.

    Returns:
        Why it was not drawn, in words; ``None`` if it was drawn.
    """
    missing = plot_style.unsupported_reason()
    if missing is None:
        kinds = kinds or {name: name for name in histories}
        losses = {
            name: "GEM loss" if kind.startswith("interpretable") else "cross-entropy"
            for name, kind in kinds.items()
        }
        charts.learning_curves(histories, out / "learning_curves.png", "Acc", losses=losses)
    return missing


def subsets(family: SubsetFamily, path: Path, title: str = "What each expert sees") -> None:
    """Draw figure 7: groups by experts; a cell is filled if the expert sees the group.

    Args:
        family: The subsets of the experts.
        path: The PNG file.
        title: The title.
    """
    figure = plot_style.canvas(2.6 + 0.95 * family.num_experts, 2.3 + 0.5 * family.num_groups)
    ax = figure.subplots()
    seen = family.membership.T.cpu()
    for n, row in enumerate(seen.tolist()):
        for i, full in enumerate(row):
            ax.add_patch(_cell(i, n, BLUE if full else _PALE))
    _grid_axes(ax, family.num_experts, family.num_groups)
    ax.set_xticks(range(family.num_experts), _labels(family.names), fontsize=9)
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
    """Draw which experts decide the tracks of each cause: causes by experts, in per cent.

    Args:
        decisive: ``decisive`` of :meth:`Deciders.report`.
        family: The subsets of the experts.
        path: The PNG file.
        model: Name of the model.
    """
    rows = decisive["causes"]
    figure = plot_style.canvas(3.6 + 1.0 * family.num_experts, 2.7 + 0.56 * len(rows))
    ax = figure.subplots()
    colors = _colors()
    for n, row in enumerate(rows.values()):
        needed = set(row["groups"])
        for i, (expert, share) in enumerate(row["decided"].items()):
            ax.add_patch(_cell(i, n, colors(0.9 * share)))
            if needed <= set(family.subsets[expert]):
                ax.add_patch(_cell(i, n, "none", edge=ORANGE, inset=0.06, lw=2))
            text = f"{100 * share:.0f}" if share >= 0.005 else ""
            ax.text(i, n, text, ha="center", va="center", fontsize=10, color=_ink(share))
    _grid_axes(ax, family.num_experts, len(rows))
    ax.set_xticks(range(family.num_experts), _labels(family.names), fontsize=9)
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
    verbs: tuple[str, str] = ("played", "skipped"),
    rows: str = "expert",
) -> None:
    """Draw figure 11: experts by tracks of half B of one session, and the predictions.

    Args:
        attribution: Share of each expert, or of several together, ``(tracks, H)``.
        names: Names of the experts, or of the sums.
        positions: Positions of the tracks in the session, from 1.
        labels: Whether each track was skipped.
        probability: Predicted probability that each track is skipped.
        path: The PNG file.
        title: First line of the title.
        verbs: What is said of a label that is false, and of one that is true.
        rows: What ``names`` are.
    """
    tracks, experts = len(positions), len(names)
    figure = plot_style.canvas(3.9 + 0.78 * max(tracks, 5), 3.1 + 0.42 * (experts + 2))
    top, ax = figure.subplots(2, 1, height_ratios=[2, experts], sharex=True)
    _draw_predictions(top, labels, probability, verbs)
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
    ax.set_ylabel(plot_style.wrap(f"{rows}: share of the decision (%)", 9 * experts))
    skips = [*labels, *(chance > 0.5 for chance in probability)]
    handles = [_patch(ORANGE, verbs[1])] * any(skips) + [_patch(_PALE, verbs[0])] * (not all(skips))
    handles.append(_patch(colors(0.5), "the darker, the larger the share"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    wrong = sum(label != (chance > 0.5) for label, chance in zip(labels, probability, strict=True))
    told = f"wrong in {wrong} of {tracks} predictions" + (" (framed)" if wrong else "")
    figure.suptitle(f"{title}\n{told}", fontsize=12)
    plot_style.save(figure, path)


def _draw_predictions(
    ax: Any, labels: Sequence[bool], probability: Sequence[float], verbs: tuple[str, str]
) -> None:
    """Draw two rows of cells: the labels, and the predictions with frames around wrong ones."""
    short = ("play", "skip") if verbs == ("played", "skipped") else verbs
    for t, (label, chance) in enumerate(zip(labels, probability, strict=True)):
        for row, skipped in enumerate((label, chance > 0.5)):
            ax.add_patch(_cell(t, row, ORANGE if skipped else _PALE))
        text = f"{100 * chance:.0f} %"
        ax.text(t, 0, short[label], ha="center", va="center", fontsize=9)
        wrong = label != (chance > 0.5)
        weight, color = ("bold", "#B00020") if wrong else ("normal", "black")
        ax.text(t, 1, text, ha="center", va="center", fontsize=9, color=color, fontweight=weight)
        if wrong:
            ax.add_patch(_cell(t, 1, "none", edge=color, inset=0.05, lw=2))
    _grid_axes(ax, len(labels), 2)
    ax.set_yticks([0, 1], ["label", f"predicted {short[1]}"], fontsize=9)
    ax.tick_params(labelbottom=False)


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


def _labels(names: Sequence[str]) -> list[str]:
    """Names of experts with one group a line, for narrow columns."""
    return [name.replace("+", "+\n") for name in names]


def _grid_axes(ax: Any, columns: int, rows: int) -> None:
    ax.set_xlim(-0.5, columns - 0.5)
    ax.set_ylim(rows - 0.5, -0.5)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
