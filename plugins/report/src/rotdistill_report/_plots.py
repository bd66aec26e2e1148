"""The plots of a report as inline SVG: text stays text, lines of it take the page's own colour, so that they read in light and dark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rotdistill_core.evaluation.metrics import column
from rotdistill_report._attention import chosen, draw, moved
from rotdistill_report._data import ReportData
from rotdistill_report._svg import COLOURS, INK, MARKS, STYLE, legend, lines_of, svg, svg_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
            {"before: nothing moved": f"{part}.identity_score", "permuted": f"{part}.score", "null: at random": f"{part}.random_score"},
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


def plots(told: ReportData, root: Path) -> list[Plot]:
    """Return the plots for which there is something to show; `root` is the folder of runs."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        return [
            *_scores(told),
            *_layers(told),
            *_ways(told),
            *_solved(told),
            *_attention(told, root),
            *_languages(told),
        ]


def _scores(told: ReportData) -> Iterator[Plot]:
    """Yield the held-out KL of all variants with its intervals, and the guard's beside it."""
    found = {
        metric: told.estimates[metric] for metric in ("kl", "guard_kl") if metric in told.estimates
    }
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
                markersize=5,
            )
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel("KL(teacher ‖ variant), nats per token")
        axes.set_ylabel("variant")
        legend(axes, len(found))

    yield Plot(
        "KL to the teacher",
        svg("KL to the teacher", draw, 1.4 + 0.32 * len(told.table)),
        "Points with 95 % intervals over texts; left is nearer.",
    )


def _layers(told: ReportData) -> Iterator[Plot]:
    """Yield how near hidden states are, layer by layer, before (`base`) and after; what lies on another line is named, not drawn."""
    for metric, variants in told.layers.items():
        spread = [value for points in variants.values() for value in points.values()]
        lines: dict[str, dict[int, float]] = {}
        same: dict[str, list[str]] = {}
        for name in (n for n in dict.fromkeys((told.base, *variants)) if n in variants):
            on = next(
                (
                    other
                    for other in lines
                    if _alike(variants[name], lines[other], max(spread) - min(spread))
                ),
                None,
            )
            if on is None:
                lines[name] = variants[name]
            else:
                same.setdefault(on, []).append(name)
        title = f"{column(metric).title} by layer"
        made = svg(
            title, partial(lines_of, lines=lines, x=BOUNDARY, y=_unit(metric), before=told.base)
        )
        yield Plot(
            title,
            made,
            " ".join(
                [
                    _about(metric),
                    *(f"On the line of {on}: {', '.join(names)}." for on, names in same.items()),
                ]
            ),
        )


def _ways(told: ReportData) -> Iterator[Plot]:
    """Yield the loss on the lines between models that evaluators noted, beside the chords that a barrier is measured from."""
    found: dict[str, dict[str, dict[float, float]]] = {}
    for done in told.steps:
        for curve in done["report"].curves:
            ends = (
                done["variant"] if end == "variant" else end.removeprefix("run:")
                for end in (curve.start, curve.end)
            )
            found.setdefault(done["step"], {})[" to ".join(ends)] = dict(
                zip(curve.positions, curve.losses, strict=True)
            )
    for step, lines in found.items():
        about: list[str] = []

        def draw(
            axes: Axes, lines: Mapping[str, Mapping[float, float]] = lines, about: list[str] = about
        ) -> None:
            for k, (name, points) in enumerate(lines.items()):
                chord = {t: (1 - t) * points[0.0] + t * points[1.0] for t in points}
                about.append(f"{name}: {max(points[t] - chord[t] for t in points):.3g}")
                axes.plot(
                    [*points],
                    [*points.values()],
                    marker=MARKS[k % 8],
                    color=COLOURS[1 + k % 7],
                    label=name,
                )
                axes.plot(
                    [*chord], [*chord.values()], ":", color=COLOURS[1 + k % 7], label="_chord"
                )
            axes.set_xlabel("share of the second model")
            axes.set_ylabel("KL(teacher ‖ mix), nats per token")
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.1)

        title = f"{step}: between two models"
        made = svg(title, draw, 2.6 + 0.2 * len(lines))
        yield Plot(
            title,
            made,
            f"Dotted: the chord. Barrier, the highest rise above it: {'; '.join(about)}.",
        )


def _alike(points: Mapping[int, float], others: Mapping[int, float], spread: float) -> bool:
    """Say whether two curves could not be told apart where both are, in a plot of this spread."""
    shared = points.keys() & others.keys()
    return bool(shared) and max(abs(points[k] - others[k]) for k in shared) <= 0.01 * spread


def _unit(metric: str) -> str:
    return {"hidden_cosine": "cosine to the teacher's state", "residual_rms_diff": "RMS difference / teacher's RMS",
            "channel_rms_gap": "mean |ln| of channel RMS ratio"}.get(metric, metric)  # fmt: skip


def _about(metric: str) -> str:
    way = {1: "; higher is nearer", -1: "; lower is nearer", 0: ""}[column(metric).better]
    return f"On held-out answers, in the teacher's frame{way}."


def _solved(told: ReportData) -> Iterator[Plot]:
    """Yield what aligners found at each boundary: cosines beside their null, RMS ratio, orthogonality, spectra, permutations."""
    for step, diagnostics in told.diagnostics.items():
        for what, (keys, y, log, about) in SOLVED.items():
            found = {name: _card_line(diagnostics, key) for name, key in keys.items()}
            there = {
                name: points
                for name, points in found.items()
                if points and not (log and min(points.values()) <= 0)
            }
            if there:
                title = f"{step}: {what}"
                made = svg(title, partial(lines_of, lines=there, x=BOUNDARY, y=y, log=log))
                yield Plot(title, made, about)
        yield from _spectra(step, diagnostics)


def _card_line(diagnostics: Mapping[int, Mapping[str, Any]], path: str) -> dict[int, float]:
    """Return what cards have under `key` or `part.key`, by layer."""
    part, _, key = path.rpartition(".")
    inner = {layer: card.get(part, {}) if part else card for layer, card in diagnostics.items()}
    return {
        layer: card[key] for layer, card in inner.items() if isinstance(card.get(key), int | float)
    }


def _spectra(step: str, diagnostics: Mapping[int, Mapping[str, Any]]) -> Iterator[Plot]:
    there = {layer: card for layer, card in diagnostics.items() if card.get("singular_values")}
    if not there:
        return
    some = sorted({min(there), sorted(there)[len(there) // 2], max(there)})
    lines = {f"boundary {layer}": there[layer]["singular_values"] for layer in some}
    if (
        len({card["stage"] for card in there.values() if "stage" in card}) == 1
    ):  # one solve for the whole stream
        lines = {
            "fitted": there[some[0]]["singular_values"],
            NULL: there[some[0]].get("singular_values_shuffled", []),
        }

    def draw(axes: Axes) -> None:
        first = max(next(iter(lines.values()))[0], 1e-300)
        for k, (name, values) in enumerate(lines.items()):
            axes.loglog(
                range(1, len(values) + 1),
                [max(v / first, 1e-16) for v in values],
                color=COLOURS[1 + k],
                label=name,
            )
        axes.set_xlabel("number of the singular value")
        axes.set_ylabel("share of the largest")
        legend(axes, len(lines))

    yield Plot(
        f"{step}: spectrum",
        svg(f"{step}: spectrum", draw),
        "Of the cross moments of student and teacher rows; where it falls to the null, nothing is shared.",
    )


def _attention(told: ReportData, root: Path) -> Iterator[Plot]:
    """Yield attention maps before and after a permutation of heads, where the step kept them: of layers whose heads moved, or one."""
    for step, diagnostics in told.diagnostics.items():
        kept = {
            layer: card
            for layer, card in diagnostics.items()
            if "attention" in card and chosen(card)
        }
        for layer, card in (
            {i: card for i, card in kept.items() if moved(card)} or dict([*kept.items()][:1])
        ).items():
            title = f"{step}: attention in layer {layer}"
            made = svg_of(title, partial(draw, path=root / card["attention"], card=card), 4.6)
            yield Plot(
                title,
                made,
                f"One text: the teacher, and the student's heads in the same places before and after. {moved(card)} moved.",
            )


def _languages(told: ReportData) -> Iterator[Plot]:
    """Yield the change of the KL in each language."""
    base = told.languages.get(told.base, {})
    gains = {
        variant: {k: row[k].value - base[k].value for k in row if k in base}
        for variant, row in told.languages.items() if variant != told.base
    }  # fmt: skip
    gains = {
        variant: row for variant, row in gains.items() if any(abs(x) > 1e-2 for x in row.values())
    }
    if not gains or len(base) < 2:
        return

    def draw(axes: Axes) -> None:
        names = sorted(base)
        for k, (variant, row) in enumerate(gains.items()):
            at = [
                number + 0.5 * ((k + 0.5) / len(gains) - 0.5) for number in range(len(names))
            ]  # beside each other, not on each other
            values = [row.get(name, float("nan")) for name in names]
            axes.plot(values, at, MARKS[k % 8], color=COLOURS[1 + k % 7], label=variant)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel(f"change of held-out KL against {told.base}, nats per token")
        axes.set_ylabel("language")
        legend(axes, len(gains))

    yield Plot(
        "Change by language",
        svg("Change by language", draw, 1.5 + 0.24 * len(base)),
        "Left of the line: nearer to the teacher.",
    )
