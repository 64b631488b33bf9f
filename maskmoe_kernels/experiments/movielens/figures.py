"""Figures of the MovieLens experiment: learning, who decides, and what simple explanations cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.experiments.movielens.sufficient import Contributions
from maskmoe_kernels.experiments.shared import charts, contributions, hasse, plot_style
from maskmoe_kernels.experiments.shared.plot_style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    MARKERS,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    canvas,
    light_grid,
    save,
)
from maskmoe_kernels.layout.subsets import SubsetFamily

#: How much of a metric's range 0..1 the frontier shows at the least.
_SPAN = 0.2
#: What models of experts minimise; the others have the cross-entropy of their one logit.
_LOSSES = {"interpretable": "GEM loss", "sufficient": "cross-entropy of all experts"}
_PREDICTION = "prediction: the expert that sees all"
_UNITS = {"sharpness": "no unit", "tolerance": "log-odds"}
_CURVES = {
    "sharpness": "mixture, by sharpness",
    "tolerance": "smallest experts that suffice, by tolerance",
}


def draw(report: Mapping[str, Any], out: Path) -> str | None:
    """All figures of a report, as png files in ``out``.

    Returns:
        Why there are none, in words; ``None`` where they were drawn.
    """
    missing = plot_style.unsupported_reason()
    if missing is not None:
        return missing
    histories = {name: model["history"] for name, model in report["models"].items()}
    losses = {name: _LOSSES.get(name, "cross-entropy") for name in histories}
    charts.learning_curves(histories, out / "learning_curves.png", losses=losses)
    for name, draw_frontier in (
        ("interpretable", _draw_frontier),
        ("sufficient", _draw_sufficient),
    ):
        if name in report["models"]:
            hasse.hasse(SubsetFamily(**report["models"][name]["family"]), out / "hasse.png")
            draw_frontier(report["models"], out)
    return None


def draw_contributions(family: SubsetFamily, added: Contributions, out: Path) -> None:
    """What groups add to all recommendations, and how much of it together."""
    names = list(family.groups)
    contributions.over_data(
        names,
        added.phi,
        out / "contributions.png",
        title="What decides what users are shown? Shapley values of all recommendations\n"
        "content: what it says of this movie, less what it says of the mean one",
        colour=added.probability,
        colour_name="probability of watching",
    )
    contributions.interaction_matrix(
        names,
        added.interactions.abs().mean(0),
        out / "interactions.png",
        title="Which groups act together?\nDiagonal: alone; off it: half of what a pair adds.\n"
        "Content is the base: what it does with others is theirs",
    )


def _draw_frontier(models: Mapping[str, Any], out: Path) -> None:
    """Figure 6 with the paper's mixing rule and with the chosen one; what lies between them."""
    interpretable, chosen = models["interpretable"], models["interpretable"]["sharpness"]
    for point in interpretable["frontier"]:
        if point["sharpness"] not in (1, chosen):
            continue
        plain = point["sharpness"] == 1
        charts.attribution_bars(
            list(point["decided"]),
            list(point["mean_attribution"].values()),
            list(point["decided"].values()),
            out / ("attribution.png" if plain else "attribution_chosen.png"),
            title=f"Which features decide? Sharpness {point['sharpness']:g}",
        )
    points = _points(interpretable, "sharpness")
    frontier(points, chosen, out / "frontier.png", _levels(models))


def _draw_sufficient(models: Mapping[str, Any], out: Path) -> None:
    """What smaller experts answer as well, over tolerance; the mixture's frontier beside it."""
    found = models["sufficient"]
    mixture = models.get("interpretable")
    frontier(
        _points(found, "tolerance"),
        found["tolerance"],
        out / "sufficient.png",
        _levels(models),
        "How often does a smaller expert suffice?",
        setting="tolerance",
        mixture=None if mixture is None else _points(mixture, "sharpness"),
        prediction=_short_names(found["test"]),
    )


def _points(model: Mapping[str, Any], setting: str) -> list[dict[str, Any]]:
    return [
        {setting: p[setting], "decided": p["decided"], **_short_names(p["test"])}
        for p in model["frontier"]
    ]


def _levels(models: Mapping[str, Any]) -> dict[str, float] | None:
    black_box = models.get("black-box")
    return None if black_box is None else _short_names(black_box["test"])


def _short_names(metrics: Mapping[str, float]) -> dict[str, float]:
    return {"hr": metrics["HR@10"], "ndcg": metrics["NDCG@10"]}


def frontier(
    points: Sequence[Mapping[str, Any]],
    chosen: float,
    path: str | Path,
    black_box: Mapping[str, float] | None = None,
    title: str = "What does a simple explanation cost?",
    *,
    setting: str = "sharpness",
    mixture: Sequence[Mapping[str, Any]] | None = None,
    prediction: Mapping[str, float] | None = None,
) -> None:
    """HR@10 and NDCG@10 against the share of items each expert decides, over sharpness.

    Args:
        points: One per sharpness: ``{"sharpness", "hr", "ndcg", "decided": {expert: share}}``,
            the largest expert last in ``decided``.
        chosen: Sharpness of the chosen point.
        path: Where to write the PNG.
        black_box: ``{"hr", "ndcg"}``, drawn as levels.
        title: First line of the figure.
        setting: What points differ in: ``"sharpness"``, or ``"tolerance"`` of sufficiency.
        mixture: The points of a mixture over sharpness, drawn beside the others.
        prediction: ``{"hr", "ndcg"}`` of the expert that sees all, if others only explain.

    Raises:
        LayoutError: No points, or ``chosen`` is not the sharpness of one.
        BackendError: matplotlib is missing.
    """
    points = sorted(points, key=lambda point: float(point[setting]))
    settings = [float(point[setting]) for point in points]
    if not points or chosen not in settings:
        raise LayoutError(f"chosen must be the {setting} of a point, one of {settings}: {chosen}")
    figure = canvas(12.5, 6.0)
    left, middle, right = figure.subplots(1, 3)
    largest = list(points[0]["decided"])[-1]
    at = settings.index(chosen)
    beside = [] if mixture is None else sorted(mixture, key=lambda point: float(point["sharpness"]))
    for ax, key, name in ((left, "hr", "HR@10"), (middle, "ndcg", "NDCG@10")):
        _mixture_curve(ax, beside, key, largest)
        _frontier_panel(ax, points, key, at, largest, setting)
        levels = []
        for of, style, label in ((black_box, "--", "black box"), (prediction, ":", _PREDICTION)):
            if of is not None:
                levels.append(of[key])
                ax.axhline(of[key], color=BLACK, ls=style, lw=1.2, label=label)
        low, high = _shown_range([*(point[key] for point in [*points, *beside]), *levels])
        ax.set_ylim(low, high)
        cut = "" if (low, high) == (0, 1) else f"; axis cut: {low:g} to {high:g}"
        ax.set_ylabel(f"{name} (0 to 1{cut})")
        ax.set_title(f"{name}: higher is better", fontsize=11)
    _decided_panel(right, points, at, setting)
    figure.suptitle(
        f"{title}\nFurther right, {largest!r} decides more items; further left, smaller experts do",
        fontsize=13,
    )
    curves, deciders = left.get_legend_handles_labels(), right.get_legend_handles_labels()
    entries = [a + b for a, b in zip(curves, deciders, strict=True)]
    figure.legend(*entries, loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    save(figure, path)


def _shown_range(values: Sequence[float]) -> tuple[float, float]:
    """A fifth of 0..1 around the values, on tenths of the whole; all of it if they need more.

    On twentieths, if that makes them fit. Both metrics have the same scale, so that a small
    difference looks small in both panels.
    """
    middle = (min(values) + max(values)) / 2
    for parts in (10, 20):
        low = round(parts * (middle - _SPAN / 2)) / parts
        low = min(max(low, 0.0), 1 - _SPAN)
        if low <= min(values) and max(values) <= low + _SPAN:
            return low, round(low + _SPAN, 6)
    return 0.0, 1.0


def _mixture_curve(ax: Any, points: Sequence[Mapping[str, Any]], key: str, largest: str) -> None:
    if points:
        x = [100 * point["decided"][largest] for point in points]
        style = {"color": GREY, "marker": "v", "ms": 5, "label": "the paper's mixture"}
        ax.plot(x, [point[key] for point in points], **style)


def _frontier_panel(
    ax: Any,
    points: Sequence[Mapping[str, Any]],
    key: str,
    chosen: int,
    largest: str,
    setting: str,
) -> None:
    x = [100 * point["decided"][largest] for point in points]
    y = [point[key] for point in points]
    ax.plot(x, y, color=BLUE, marker="o", ms=4, label=_CURVES[setting])
    for k, marker, end in ((0, "s", "lower"), (len(points) - 1, "D", "upper")):
        name = f"{end} end: {setting} {points[k][setting]:g}"
        style = {"marker": marker, "ms": 9, "mfc": "white", "mec": BLACK, "mew": 1.5, "ls": ""}
        ax.plot(x[k], y[k], label=name, **style)
    star = {"marker": "*", "ms": 19, "color": VERMILLION, "mec": BLACK, "ls": "", "zorder": 5}
    ax.plot(
        x[chosen],
        y[chosen],
        label=f"chosen (star, line): {setting} {points[chosen][setting]:g}",
        **star,
    )
    ax.set_xlabel(f"items decided by {largest!r} (%)")
    ax.margins(0.12)
    light_grid(ax, "both")


def _decided_panel(ax: Any, points: Sequence[Mapping[str, Any]], chosen: int, setting: str) -> None:
    x = [float(point[setting]) for point in points]
    experts = list(points[0]["decided"])
    for k, expert in enumerate(experts):
        y = [100 * point["decided"][expert] for point in points]
        marker = {"marker": MARKERS[(k + 1) % len(MARKERS)], "ms": 5}
        others = (SKY, PURPLE, GREEN, ORANGE, BLUE, GREY)
        color = BLACK if k == len(experts) - 1 else others[k % len(others)]
        ax.plot(x, y, color=color, label=f"decided by {expert}", **marker)
    ax.axvline(x[chosen], color=VERMILLION, lw=1.5, zorder=0)
    if min(x) > 0 and max(x) / min(x) > 4:
        ax.set_xscale("log", base=2)
        labelled = _labelled(x, chosen)
        ax.set_xticks(labelled, [f"{value:g}" for value in labelled])
        ax.minorticks_off()
    ax.set_xlabel(f"{setting} ({_UNITS[setting]})")
    ax.set_ylabel("items decided (%)")
    ax.set_title("Who decides", fontsize=11)
    ax.set_ylim(bottom=0)
    light_grid(ax, "both")


def _labelled(x: Sequence[float], chosen: int) -> list[float]:
    """Values to name on a log axis: the chosen one, the ends, and what does not touch these."""
    apart = 0.11 * math.log(max(x) / min(x))
    named: list[float] = []
    for value in (x[chosen], x[0], x[-1], *x):
        if all(abs(math.log(value / other)) >= apart for other in named):
            named.append(value)
    return sorted(named)
