"""Plots as inline SVG that read in light and in dark.

Text stays text, and whatever is drawn in ink takes the colour of the page.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatterSciNotation

from rotdistill_core.characters import visible
from rotdistill_core.store.hashing import digest

INK = "#010203"
"""Placeholder of the page's text colour; `svg_of_figure` replaces it."""
COLOURS = ("#7f7f7f", "#3a86d8", "#d55e00", "#009e73", "#b07aa1", "#a07d00", "#c44e52", "#4c9aa8")
"""Legible on white and on near-black; the first is grey."""
MARKERS = "osD^vPX*"
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
LONGEST_LABEL = 60
"""Characters of a label; of longer ones the plot would have no room."""
WIDTH = 4.6
"""Inches: a plot is legible on a phone without zooming."""
STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "legend.fontsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "axes.grid": True,
    "grid.color": "#7f7f7f",
    "grid.alpha": 0.3,
}


class Role(Enum):
    """What a line of a plot stands for."""

    RESULT = "-"
    BEFORE = "--"
    NULL = ":"


class Line(NamedTuple):
    """A line of a plot: points by layer boundary."""

    label: str
    points: Mapping[int, float]
    role: Role = Role.RESULT


def series_colour(number: int) -> str:
    """Return the colour of the series with this number; grey is for what comes before an edit."""
    return COLOURS[1 + number % (len(COLOURS) - 1)]


def series_marker(number: int) -> str:
    """Return the marker of the series with this number."""
    return MARKERS[number % len(MARKERS)]


class PlainPowers(LogFormatterSciNotation):
    """Ticks of a logarithmic axis as plain text, `10⁻³`: no label of a plot is a formula."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Return the label of one tick."""
        formula: str = super().__call__(x, pos)
        text = formula.removeprefix("$\\mathdefault{").removesuffix("}$").replace("\\times", "×")
        return re.sub(r"\^\{(-?\d+)\}", lambda match: match[1].translate(RAISED), text)


def svg_of_axes(name: str, draw: Callable[[Axes], None], height: float = 2.9) -> Markup:
    """Return one plot, `height` in inches, that `draw` fills."""
    return svg_of_figure(name, lambda figure: draw(figure.add_subplot()), height)


def svg_of_figure(name: str, draw: Callable[[Figure], None], height: float) -> Markup:
    """Return one figure as SVG whose ids no other plot of the page has.

    Labels are shown as they are, whatever they hold: matplotlib escapes them.
    """
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    draw(figure)
    for text in figure.findobj(Text):
        text.set_text(_shortened(visible(text.get_text())))
    stream = io.StringIO()
    # Salted with the name, ids are the same in every run. Without a date, so are the bytes.
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        # Text stays text, so the page finds a font for letters that matplotlib's own has not.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        # Many long names leave no room for the plot, and nobody can give it any.
        warnings.filterwarnings("ignore", "constrained_layout not applied")
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    document = stream.getvalue()
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # The page sets the size.
    svg = re.sub(r"\s(?:width|height)=\"[\d.]+pt\"", "", svg)
    # Names that differ in other characters alone get other ids, too.
    prefix = f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{digest(name)[:6]}"
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\1{prefix}-", svg)
    svg = svg.replace(INK, "currentColor")
    opening = Markup('<svg role="img" aria-label="{}" ').format(visible(name))
    return opening + Markup(svg.removeprefix("<svg "))  # noqa: S704  (matplotlib has escaped it)


def _shortened(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 1]}…"


def use_plain_powers(axis: Axis) -> None:
    """Label a logarithmic axis in plain text."""
    axis.set_major_formatter(PlainPowers())
    axis.set_minor_formatter(PlainPowers(labelOnlyBase=False))


def draw_legend(axes: Axes, entries: int) -> None:
    """Put the legend above the plot, in at most three columns."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=min(3, entries),
        borderaxespad=0.1,
        handlelength=1.6,
        columnspacing=1.2,
    )


def draw_lines(axes: Axes, lines: Sequence[Line], x: str, y: str, log: bool = False) -> None:
    """Draw lines with a legend; `x` and `y` label the axes, `log` makes the y axis logarithmic."""
    for number, line in enumerate(lines):
        before = line.role is Role.BEFORE
        axes.plot(
            [*line.points],
            [*line.points.values()],
            line.role.value,
            marker=series_marker(number),
            color=COLOURS[0] if before else series_colour(number),
            label=line.label,
            markevery=max(1, len(line.points) // 12),
        )
    if log:
        axes.set_yscale("log")
        use_plain_powers(axes.yaxis)
        # Two decades more, or values that are all alike get ticks within one decade.
        low, high = axes.get_ylim()
        axes.set_ylim(low / 10, high * 10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.locator_params("x", integer=True)
    draw_legend(axes, len(lines))
