"""Two pictures of a run: speed-ups by shape, and the roofline."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.cases import DTYPES
from bench.counts import PHASES
from bench.layers.ratios import Line, lines
from maskmoe_kernels.experiments.shared import plot_style
from maskmoe_kernels.files import replacing
from maskmoe_kernels.layout.families import FAMILIES

SPEEDUP, ROOFLINE = "speedup.png", "roofline.png"
_OF_BATCH = (plot_style.SKY, plot_style.BLUE, plot_style.BLACK, plot_style.PURPLE)
_OF_WIDTH = (
    plot_style.ORANGE,
    plot_style.VERMILLION,
    plot_style.GREEN,
    plot_style.BLUE,
    plot_style.PURPLE,
)
_MARKERS = ("o", "s", "^", "D", "v")

Places = dict[tuple[str, int], float]


def draw(document: dict[str, Any], out: Path) -> str | None:
    """Draw both pictures into ``out``.

    Returns:
        Why there are none, in words; ``None`` if they were drawn.
    """
    reason = plot_style.unsupported_reason()
    found = [line for result in document["results"] for line in lines(result)]
    if reason is None and not found:
        reason = "nothing was measured"
    if reason is None:
        speedups(found, out / SPEEDUP)
        roofline(found, document["peak_rates"], out / ROOFLINE)
    return reason


# --- Speed-up ----------------------------------------------------------------------------


def speedups(found: Sequence[Line], path: Path) -> None:
    """Time of the best exact rival / ours: a panel by phase and dtype, families side by side."""
    found = [line for line in found if line.speedup is not None]
    dtypes, batches = _dtypes(found), sorted({line.case.batch for line in found})
    places = _places({(line.case.family, line.case.width) for line in found})
    wide = max(places.values(), default=0) + 2
    figure = _figure(max(6.5, max(4.2, 0.26 * wide) * len(dtypes) + 0.8), 9)
    axes = figure.subplots(
        len(PHASES), max(len(dtypes), 1), sharex=True, sharey=True, squeeze=False
    )
    for k, phase in enumerate(PHASES):
        for ax, dtype in zip(axes[k], dtypes, strict=False):
            some = [x for x in found if (x.phase, x.case.dtype) == (phase, dtype)]
            _speedup_panel(ax, some, places, batches)
        axes[k][0].set_ylabel(f"{phase}\nspeed-up", fontsize=10)
    for ax, dtype in zip(axes[0], dtypes, strict=False):
        ax.set_title(dtype, fontsize=11)
    _speedup_scale(axes[0][0], [line.speedup for line in found if line.speedup is not None])
    for ax in axes[-1]:
        _name_shapes(ax, places)
    line = importlib.import_module("matplotlib.lines").Line2D
    handles = [line([], [], color=_pick(_OF_BATCH, k), marker="o") for k in range(len(batches))]
    _legend(figure, handles, [f"B = {batch:,} rows" for batch in batches])
    figure.suptitle(
        "Speed-up over the fastest rival with the same function and gradient\n"
        "above the line we are faster; d is the width of an expert",
        fontsize=12,
    )
    _save(figure, path)


def _places(shapes: set[tuple[str, int]]) -> Places:
    """The x position of each shape, with a gap between families."""
    places: Places = {}
    at = 0.0
    for family in FAMILIES:
        widths = sorted(width for name, width in shapes if name == family)
        for width in widths:
            places[family, width] = at
            at += 1.0
        at += 1.2 if widths else 0.0
    return places


def _speedup_panel(ax: Any, found: Sequence[Line], places: Places, batches: Sequence[int]) -> None:
    ax.axhspan(1e-9, 1, color=plot_style.VERMILLION, alpha=0.07, lw=0, zorder=0)
    ax.axhline(1, color=plot_style.BLACK, lw=1.2, zorder=1)
    for k, batch in enumerate(batches):
        some = [line for line in found if line.case.batch == batch]
        shift = 0.26 * (k - (len(batches) - 1) / 2)
        x = [places[line.case.family, line.case.width] + shift for line in some]
        y = [line.speedup for line in some]
        color = _pick(_OF_BATCH, k)
        ax.vlines(x, 1, y, color=color, lw=2.0, alpha=0.5, zorder=2)
        ax.plot(x, y, "o", color=color, ms=4.5, zorder=3)
    ax.set_xlim(-0.8, max(places.values(), default=0) + 0.8)
    ax.tick_params(axis="x", length=0)
    _plain_grid(ax, "y")


def _speedup_scale(ax: Any, values: Sequence[float]) -> None:
    """A log axis around 1 with readable ticks."""
    low, high = min([0.9, *values]) / 1.2, max([1.1, *values]) * 1.2
    ticks = importlib.import_module("matplotlib.ticker")
    steps = (1, 2, 5) if high / low > 6 else (1, 1.5, 2, 3, 5, 7)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(ticks.LogLocator(subs=steps, numticks=40))
    ax.yaxis.set_major_formatter(ticks.FuncFormatter(lambda value, _: f"{value:g}x"))
    ax.yaxis.set_minor_locator(ticks.NullLocator())
    ax.set_ylim(low, high)


def _name_shapes(ax: Any, places: Places) -> None:
    """Widths below the axis, families below the widths."""
    ax.set_xticks(list(places.values()), [str(width) for _, width in places], fontsize=8)
    ax.annotate("d", (0, 0), (-14, -4), "axes fraction", "offset points", va="top", fontsize=8)
    spots: dict[str, list[float]] = {}
    for (family, _), at in places.items():
        spots.setdefault(family, []).append(at)
    style: dict[str, Any] = {"fontsize": 9, "fontweight": "bold", "va": "top", "ha": "center"}
    if any(len(at) < 3 for at in spots.values()):  # names would overlap
        style |= {"ha": "right", "rotation": 40, "rotation_mode": "anchor"}
    for family, ends in spots.items():
        middle = (ends[0] + ends[-1]) / 2
        coordinates = ("data", "axes fraction")
        ax.annotate(family, (middle, 0), (0, -22), coordinates, "offset points", **style)


# --- Roofline ----------------------------------------------------------------------------


def roofline(found: Sequence[Line], rates: dict[str, Any], path: Path) -> None:
    """GFLOP/s over FLOPs a byte, beside what torch's own GEMM and copy reach here."""
    dtypes = _dtypes(found)
    widths, batches = (
        sorted({getattr(line.case, name) for line in found}) for name in ("width", "batch")
    )
    figure = _figure(12.6, 3.9 * len(dtypes) + 1.2)
    axes = figure.subplots(len(dtypes), len(PHASES), sharex=True, sharey=True, squeeze=False)
    span = _span([line.intensity for line in found], [rates[name] for name in dtypes])
    for row, dtype in zip(axes, dtypes, strict=True):
        for ax, phase in zip(row, PHASES, strict=True):
            _peak_lines(ax, rates[dtype], span)
            for line in found:
                if (line.phase, line.case.dtype) == (phase, dtype):
                    color = _pick(_OF_WIDTH, widths.index(line.case.width))
                    _point(ax, line, color, _pick(_MARKERS, batches.index(line.case.batch)))
            ax.set_title(f"{phase}, {dtype}", fontsize=10)
        row[0].set_ylabel("GFLOP/s of present blocks")
    for ax in axes[-1]:
        ax.set_xlabel("FLOPs a byte that must move")
    _roofline_legend(figure, widths, batches)
    figure.suptitle(
        "Our kernels and this machine's roofs: torch's own GEMM and copy in the same dtype",
        fontsize=12,
    )
    _save(figure, path)


def _span(intensities: Sequence[float], rates: Sequence[dict[str, float]]) -> tuple[float, float]:
    ridges = [rate["gflops"] / rate["gbs"] for rate in rates]
    low, high = min([*intensities, *ridges]), max([*intensities, *ridges])
    return 2 ** math.floor(math.log2(low) - 0.6), 2 ** math.ceil(math.log2(high) + 0.6)


def _peak_lines(ax: Any, rates: dict[str, float], span: tuple[float, float]) -> None:
    (low, high), peak, rate = span, rates["gflops"], rates["gbs"]
    ridge = peak / rate
    ax.plot([low, ridge, high], [rate * low, peak, peak], color=plot_style.BLACK, lw=1.6, zorder=2)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlim(low, high)
    ticks = importlib.import_module("matplotlib.ticker")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(ticks.FuncFormatter(lambda value, _: f"{value:g}"))
    style = {"textcoords": "offset points", "fontsize": 8}
    ax.annotate(f"GEMM {peak:,.0f} GFLOP/s", (high, peak), (-4, 4), ha="right", **style)
    at = low * (ridge / low) ** 0.25
    ax.annotate(f"copy {rate:,.0f} GB/s", (at, rate * at), (8, -8), ha="left", va="top", **style)
    _plain_grid(ax, "both")


def _point(ax: Any, line: Line, color: str, marker: str) -> None:
    if line.best is not None:
        rate = line.flops / line.best.us / 1e3
        grey = {"mfc": "none", "mec": "#BBBBBB", "ms": 4, "mew": 0.8, "zorder": 3}
        ax.plot(line.intensity, rate, marker, **grey)
    ax.plot(line.intensity, line.gflops, marker, color=color, ms=6, alpha=0.85, mew=0, zorder=4)


def _roofline_legend(figure: Any, widths: Sequence[int], batches: Sequence[int]) -> None:
    line = importlib.import_module("matplotlib.lines").Line2D
    handles = [line([], [], color=_pick(_OF_WIDTH, k), lw=5) for k in range(len(widths))]
    labels = [f"ours, d = {width}" for width in widths]
    for k, batch in enumerate(batches):
        handles.append(line([], [], color=plot_style.GREY, marker=_pick(_MARKERS, k), lw=0))
        labels.append(f"B = {batch:,} rows")
    handles.append(line([], [], mfc="none", mec="#AAAAAA", marker="o", lw=0))
    _legend(figure, handles, [*labels, "best exact rival"])


# --- Common ------------------------------------------------------------------------------


def _dtypes(found: Sequence[Line]) -> list[str]:
    return [name for name in DTYPES if any(line.case.dtype == name for line in found)]


def _pick(values: Sequence[str], k: int) -> str:
    return values[k % len(values)]


def _plain_grid(ax: Any, axis: str) -> None:
    ax.grid(axis=axis, color="#E0E0E0", lw=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    style = {"frameon": False, "fontsize": 9, "ncols": min(len(labels), 8)}
    figure.legend(handles, labels, loc="outside lower center", **style)


def _figure(width: float, height: float) -> Any:
    module = importlib.import_module("matplotlib.figure")
    figure = module.Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.08)
    return figure


def _save(figure: Any, path: Path) -> None:
    importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    with replacing(path) as file:
        figure.savefig(file, dpi=plot_style.DPI, format="png")
