"""The plots of a report as inline SVG: text stays text, lines of it take the page's own colour, so that they read in light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from rotdistill_told import Told, column

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
BOUNDARY = "layer boundary (0: embeddings)"


NULL = "null: shuffled rows"
MATCHED = "What the assignment gains over leaving everything in its place."
SOLVED: dict[str, tuple[dict[str, str], str, bool, str]] = {
    "cosine": (
        {"before": "cosine_before", "behind the map": "cosine_after", NULL: "cosine_shuffled"},
        "mean cosine, validation rows", False, "How well the map carries the student onto the teacher, beside what chance reaches.",
    ),
    "RMS ratio": (
        {"student / teacher": "rms_ratio"}, "RMS of student / teacher", False, "A rotation cannot change it; it is there to be known.",
    ),
    "orthogonality": (
        {"max |R Rᵀ − I|": "max_rrt", "max |RᵀR − I|": "max_rtr"}, "largest deviation", True, "Rounding in float64 is about 1e-15.",
    ),
    **{
        f"{part} matched": (
            {"nothing moved": f"{part}.identity_score", "permuted": f"{part}.score", "null: at random": f"{part}.random_score"},
            "mean similarity", False, MATCHED,
        )
        for part in ("heads", "neurons")
    },
}  # fmt: skip
"""What is plotted of an aligner's cards: lines and their keys, the axis, whether it is logarithmic, what it shows."""


class Plot(NamedTuple):
    """One plot and what it shows."""

    title: str
    svg: str
    about: str


def plots(told: Told) -> list[Plot]:
    """Return the plots for which there is something to show."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        return [*_scores(told), *_layers(told), *_solved(told), *_languages(told)]


def _svg(name: str, draw: Any, height: float = 2.9) -> str:
    """Return one figure, 4.6 inches wide so that it is read on a phone as it is, with ids of its own."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, height), layout="constrained")
    draw(figure.add_subplot())
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|\s(?:width|height)=\"[\d.]+pt\"", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\1{re.sub(r'[^a-z0-9]+', '-', name.lower())}-", svg)
    return svg.replace(INK, "currentColor").replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)


def _legend(axes: Axes, lines: int) -> None:
    """Put the legend above the plot, in as many columns as fit."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=min(3, lines), borderaxespad=0.1, handlelength=1.6, columnspacing=1.2)


def _lines(axes: Axes, lines: Mapping[str, Mapping[int, float]], x: str, y: str, log: bool = False) -> None:
    """Draw lines; what was before is grey and dashed, nulls are dotted."""
    for k, (name, points) in enumerate(lines.items()):
        before, null = k == 0 and len(lines) > 1, name.startswith("null")
        colour, style = COLOURS[0 if before else 1 + k % 7], "--" if before else ":" if null else "-"
        axes.plot([*points], [*points.values()], style, marker=MARKS[k % 8], color=colour, label=name, markevery=max(1, len(points) // 12))
    if log:
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.locator_params("x", integer=True)
    _legend(axes, len(lines))


def _scores(told: Told) -> Iterator[Plot]:
    """Yield the held-out KL of all variants with its intervals, and the guard's beside it."""
    found = {metric: told.estimates[metric] for metric in ("kl", "guard_kl") if metric in told.estimates}
    if not found:
        return

    def draw(axes: Axes) -> None:
        names = list(dict.fromkeys(name for row in found.values() for name in row))
        for k, (metric, row) in enumerate(found.items()):
            at = [names.index(name) + 0.22 * (k - 0.5 * (len(found) - 1)) for name in row]
            ends = [(e.own.value - e.own.low, e.own.high - e.own.value) for e in row.values()]
            title = "held-out" if metric == "kl" else "guard (outside the domain)"
            axes.errorbar(
                [e.own.value for e in row.values()],
                at,
                xerr=[*zip(*ends, strict=True)],
                fmt=MARKS[k],
                color=COLOURS[1 + k],
                label=title,
                capsize=2,
            )
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel("KL(teacher ‖ variant), nats per token")
        axes.set_ylabel("variant")
        _legend(axes, len(found))

    yield Plot(
        "KL to the teacher",
        _svg("KL to the teacher", draw, 1.4 + 0.32 * len(told.table)),
        "Points with 95 % intervals over texts; left is nearer.",
    )


def _layers(told: Told) -> Iterator[Plot]:
    """Yield how near hidden states are, layer by layer, before (`base`) and after; variants that lie on `base` are named, not drawn."""
    for metric, variants in told.layers.items():
        base = variants.get(told.base, {})
        same = [name for name, points in variants.items() if name != told.base and _alike(points, base)]
        order = [name for name in dict.fromkeys((told.base, *variants)) if name in variants and name not in same]
        lines = {name: variants[name] for name in order}
        title = f"{column(metric).title} by layer"
        svg = _svg(title, lambda axes, lines=lines, metric=metric: _lines(axes, lines, BOUNDARY, _unit(metric)))
        yield Plot(title, svg, _about(metric) + (f" On the line of {told.base}: {', '.join(same)}." if same else ""))
    for metric, variants in told.curves.items():
        yield Plot(
            metric, _svg(metric, lambda axes, lines=variants, m=metric: _lines(axes, lines, "place on the way", m)), "Between two models."
        )


def _alike(points: Mapping[int, float], base: Mapping[int, float]) -> bool:
    """Say whether a curve could not be told from that of `base` where both are."""
    shared = points.keys() & base.keys()
    return bool(shared) and max(abs(points[k] - base[k]) for k in shared) < 0.01 * (max(base.values()) - min(base.values()))


def _unit(metric: str) -> str:
    return {"hidden_cosine": "cosine to the teacher's state", "residual_rms_diff": "RMS difference / teacher's RMS",
            "channel_rms_gap": "mean |ln| of channel RMS ratio"}.get(metric, metric)  # fmt: skip


def _about(metric: str) -> str:
    way = {1: "; higher is nearer", -1: "; lower is nearer", 0: ""}[column(metric).better]
    return f"On held-out answers, in the teacher's frame{way}."


def _solved(told: Told) -> Iterator[Plot]:
    """Yield what aligners found at each boundary: cosines beside their null, RMS ratio, orthogonality, spectra, permutations."""
    for step, cards in told.cards.items():
        for what, (keys, y, log, about) in SOLVED.items():
            found = {name: _card_line(cards, key) for name, key in keys.items()}
            there = {name: points for name, points in found.items() if points and not (log and min(points.values()) <= 0)}
            if there:
                title = f"{step}: {what}"
                svg = _svg(title, lambda axes, there=there, y=y, log=log: _lines(axes, there, BOUNDARY, y, log))
                yield Plot(title, svg, about)
        yield from _spectra(step, cards)


def _card_line(cards: Mapping[int, Mapping[str, Any]], path: str) -> dict[int, float]:
    """Return what cards have under `key` or `part.key`, by layer."""
    part, _, key = path.rpartition(".")
    inner = {layer: card.get(part, {}) if part else card for layer, card in cards.items()}
    return {layer: card[key] for layer, card in inner.items() if isinstance(card.get(key), int | float)}


def _spectra(step: str, cards: Mapping[int, Mapping[str, Any]]) -> Iterator[Plot]:
    there = {layer: card for layer, card in cards.items() if card.get("singular_values")}
    if not there:
        return
    some = sorted({min(there), sorted(there)[len(there) // 2], max(there)})
    lines = {f"boundary {layer}": there[layer]["singular_values"] for layer in some}
    if len({card["stage"] for card in there.values() if "stage" in card}) == 1:  # one solve for the whole stream
        lines = {"fitted": there[some[0]]["singular_values"], NULL: there[some[0]].get("singular_values_shuffled", [])}

    def draw(axes: Axes) -> None:
        first = max(next(iter(lines.values()))[0], 1e-300)
        for k, (name, values) in enumerate(lines.items()):
            axes.loglog(range(1, len(values) + 1), [max(v / first, 1e-16) for v in values], color=COLOURS[1 + k], label=name)
        axes.set_xlabel("number of the singular value")
        axes.set_ylabel("share of the largest")
        _legend(axes, len(lines))

    yield Plot(
        f"{step}: spectrum",
        _svg(f"{step}: spectrum", draw),
        "Of the cross moments of student and teacher rows; where it falls to the null, nothing is shared.",
    )


def _languages(told: Told) -> Iterator[Plot]:
    """Yield the change of the KL in each language."""
    base = told.languages.get(told.base, {})
    gains = {
        variant: {k: row[k].value - base[k].value for k in row if k in base}
        for variant, row in told.languages.items() if variant != told.base
    }  # fmt: skip
    gains = {variant: row for variant, row in gains.items() if any(abs(x) > 1e-2 for x in row.values())}
    if not gains or len(base) < 2:
        return

    def draw(axes: Axes) -> None:
        names = sorted(base)
        for k, (variant, row) in enumerate(gains.items()):
            axes.plot(
                [row.get(name, float("nan")) for name in names], range(len(names)), MARKS[k % 8], color=COLOURS[(1 + k) % 8], label=variant
            )
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel(f"change of held-out KL against {told.base}, nats per token")
        axes.set_ylabel("language")
        _legend(axes, len(gains))

    yield Plot("Change by language", _svg("Change by language", draw, 1.5 + 0.24 * len(base)), "Left of the line: nearer to the teacher.")
