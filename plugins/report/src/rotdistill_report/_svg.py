"""Figures as inline SVG: text stays text, and what is ink takes the page's own colour, so that they read in light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


INK = "#010203"
"""What stands for the page's own text colour until the SVG is written."""
COLOURS = ("#7f7f7f", "#3a86d8", "#d55e00", "#009e73", "#b07aa1", "#a07d00", "#c44e52", "#4c9aa8")
"""Legible on white and on near-black."""
MARKS = "osD^vPX*"
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9.5, "axes.titlesize": 10, "legend.fontsize": 8.5,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "lines.linewidth": 1.4, "lines.markersize": 3.5,
    "axes.grid": True, "grid.color": "#7f7f7f", "grid.alpha": 0.3,
}  # fmt: skip


def svg(name: str, draw: Callable[[Axes], None], height: float = 2.9) -> str:
    """Return one plot, 4.6 inches wide so that it is read on a phone as it is."""
    return svg_of(name, lambda figure: draw(figure.add_subplot()), height)


def svg_of(name: str, draw: Callable[[Figure], None], height: float) -> str:
    """Return one figure as SVG with ids of its own."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, height), layout="constrained")
    draw(figure)
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = re.sub(
        r"<metadata>.*?</metadata>|\s(?:width|height)=\"[\d.]+pt\"",
        "",
        svg[svg.index("<svg") :],
        flags=re.DOTALL,
    )
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\1{re.sub(r'[^a-z0-9]+', '-', name.lower())}-", svg)
    return svg.replace(INK, "currentColor").replace(
        "<svg ", f'<svg role="img" aria-label="{name}" ', 1
    )


def legend(axes: Axes, lines: int) -> None:
    """Put the legend above the plot, in as many columns as fit."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=min(3, lines),
        borderaxespad=0.1,
        handlelength=1.6,
        columnspacing=1.2,
    )


def lines_of(
    axes: Axes,
    lines: Mapping[str, Mapping[int, float]],
    x: str,
    y: str,
    log: bool = False,
    before: str = "before",
) -> None:
    """Draw lines; the one called `before` is grey and dashed, nulls are dotted."""
    for k, (name, points) in enumerate(lines.items()):
        old, null = name.startswith(before), name.startswith("null")
        colour, style = COLOURS[0 if old else 1 + k % 7], "--" if old else ":" if null else "-"
        axes.plot(
            [*points],
            [*points.values()],
            style,
            marker=MARKS[k % 8],
            color=colour,
            label=name,
            markevery=max(1, len(points) // 12),
        )
    if log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(low / 10, high * 10)  # else what is all alike gets ticks within one decade
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.locator_params("x", integer=True)
    legend(axes, len(lines))
