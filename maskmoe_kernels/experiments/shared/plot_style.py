"""What all figures share: colours, pages, axes, and how a figure is written.

Figures are drawn with matplotlib's object interface (the extra ``plot``); no global state is
touched. Colours are Okabe and Ito's, which people with any colour vision can tell apart.
"""

from __future__ import annotations

import importlib
import textwrap
from pathlib import Path
from typing import Any

from maskmoe_kernels.errors import BackendError
from maskmoe_kernels.files import replacing

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


def unsupported_reason() -> str | None:
    """Why no figure can be drawn, in words for the user; ``None`` when they can."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError:
        return (
            "matplotlib, which draws the figures, is not installed. "
            'Run: pip install "maskmoe_kernels[plot]"'
        )
    return None


def module(name: str) -> Any:
    """A module of matplotlib.

    Raises:
        BackendError: matplotlib is missing.
    """
    reason = unsupported_reason()
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
