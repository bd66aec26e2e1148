"""The plots of a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes

from rotdistill_core.evaluation.metrics import Direction, metric_named
from rotdistill_core.linalg.diagnostics import AssignmentDiagnostics, LayerDiagnostics
from rotdistill_core.store.output import StepOutput
from rotdistill_core.store.results import CURVE_OF_VARIANT, Curve
from rotdistill_report._attention import draw_attention, shown_pairs
from rotdistill_report._data import ReportData
from rotdistill_report._svg import (
    INK,
    STYLE,
    Line,
    Role,
    draw_legend,
    draw_lines,
    series_colour,
    series_marker,
    svg_of_axes,
    svg_of_figure,
    use_plain_powers,
)

BOUNDARY = "layer boundary (0: embeddings)"
NULL_LABEL = "null: shuffled rows"
SAME_LINE = 0.01
"""Share of a plot's spread below which two lines cannot be told apart."""
MIN_LANGUAGE_CHANGE = 1e-2
"""Nats from which the changes of a variant by language are plotted."""
LAYER_UNITS = {
    "hidden_cosine": "cosine to the teacher's state",
    "residual_rms_diff": "RMS difference / teacher's RMS",
    "channel_rms_gap": "mean |ln| of channel RMS ratio",
}
"""Metric by layer -> label of its axis; others go by their own name."""
TRAINING_LOSSES = {"forward": "KL", "reverse": "reverse KL", "jensen-shannon": "JSD"}
"""Loss of a training run -> its short name; others go by their own name."""


class Plot(NamedTuple):
    """One plot and what it shows."""

    title: str
    svg: Markup
    caption: str


class DiagnosticLine(NamedTuple):
    """A line of a plot of layer diagnostics."""

    label: str
    field: str
    """Field of `LayerDiagnostics`, or `part.field` of its assignments."""
    role: Role = Role.RESULT


class DiagnosticPlot(NamedTuple):
    """A plot of layer diagnostics."""

    title: str
    lines: tuple[DiagnosticLine, ...]
    y_label: str
    caption: str
    log: bool = False


def _assignment_plot(part: str) -> DiagnosticPlot:
    return DiagnosticPlot(
        title=f"{part} matched",
        lines=(
            DiagnosticLine("before: nothing moved", f"{part}.identity_score", Role.BEFORE),
            DiagnosticLine("permuted", f"{part}.score"),
            DiagnosticLine("null: at random", f"{part}.random_score", Role.NULL),
        ),
        y_label="mean similarity",
        caption="The gain of the assignment over leaving everything in its place.",
    )


DIAGNOSTIC_PLOTS = (
    DiagnosticPlot(
        title="cosine",
        lines=(
            DiagnosticLine("before", "cosine_before", Role.BEFORE),
            DiagnosticLine("after the map", "cosine_after"),
            DiagnosticLine(NULL_LABEL, "cosine_shuffled", Role.NULL),
        ),
        y_label="mean cosine, validation rows",
        caption="How well the map carries the student onto the teacher, compared with chance.",
    ),
    DiagnosticPlot(
        title="RMS ratio",
        lines=(DiagnosticLine("student / teacher", "rms_ratio"),),
        y_label="RMS of student / teacher",
        caption="A rotation cannot change it.",
    ),
    DiagnosticPlot(
        title="orthogonality",
        lines=(
            DiagnosticLine("max |R Rᵀ − I|", "max_rrt"),
            DiagnosticLine("max |RᵀR − I|", "max_rtr"),
        ),
        y_label="largest deviation",
        caption="Rounding in float64 is about 1e-15.",
        log=True,
    ),
    _assignment_plot("heads"),
    _assignment_plot("neurons"),
)


def plots(report: ReportData, out: StepOutput) -> list[Plot]:
    """Return the plots for which there is something to show."""
    with matplotlib.rc_context(STYLE):
        return [
            *_kl_plot(report),
            *_layer_plots(report),
            *_interpolation_plots(report),
            *_training_plots(report),
            *_alignment_plots(report),
            *_attention_plots(report, out),
            *_language_plot(report),
        ]


def _kl_plot(report: ReportData) -> Iterator[Plot]:
    """Yield the held-out KL of all variants with intervals, and the KL outside the domain."""
    titles = {"kl": "held-out", "guard_kl": "guard (outside the domain)"}
    measured = {metric: report.estimates[metric] for metric in titles if metric in report.estimates}
    if not measured:
        return
    variants = list(dict.fromkeys(name for row in measured.values() for name in row))

    def draw(axes: Axes) -> None:
        for number, (metric, row) in enumerate(measured.items()):
            # Metrics of one variant lie above each other, around the variant's place.
            shift = 0.22 * (number - 0.5 * (len(measured) - 1))
            intervals = [estimate.own for estimate in row.values()]
            axes.errorbar(
                [each.value for each in intervals],
                [variants.index(name) + shift for name in row],
                xerr=[
                    [each.value - each.low for each in intervals],
                    [each.high - each.value for each in intervals],
                ],
                fmt=series_marker(number),
                color=series_colour(number),
                label=titles[metric],
                capsize=2,
                markersize=5,
            )
        axes.set_yticks(range(len(variants)), variants)
        axes.invert_yaxis()
        axes.set_xlabel("KL(teacher ‖ variant), nats per token")
        axes.set_ylabel("variant")
        draw_legend(axes, len(measured))

    title = "KL to the teacher"
    height = 1.4 + 0.32 * len(report.figures)
    caption = "Points with 95 % intervals over texts; left is nearer."
    yield Plot(title, svg_of_axes(title, draw, height), caption)


def _layer_plots(report: ReportData) -> Iterator[Plot]:
    """Yield hidden states layer by layer; a variant on another's line is named, not drawn."""
    for metric, variants in report.layer_curves.items():
        values = [value for points in variants.values() for value in points.values()]
        spread = max(values) - min(values)
        lines: dict[str, Line] = {}
        hidden: dict[str, list[str]] = {}
        for variant in dict.fromkeys((report.baseline, *variants)):
            if variant not in variants:
                continue
            points = variants[variant]
            twin = _line_below(points, lines, spread)
            if twin is None:
                role = Role.BEFORE if variant == report.baseline else Role.RESULT
                lines[variant] = Line(variant, points, role)
            else:
                hidden.setdefault(twin, []).append(variant)
        title = f"{metric_named(metric).title} by layer"
        unit = LAYER_UNITS.get(metric, metric)
        draw = partial(draw_lines, lines=list(lines.values()), x=BOUNDARY, y=unit)
        notes = [f"On the line of {twin}: {', '.join(names)}." for twin, names in hidden.items()]
        yield Plot(title, svg_of_axes(title, draw), " ".join([_layer_caption(metric), *notes]))


def _line_below(
    points: Mapping[int, float], lines: Mapping[str, Line], spread: float
) -> str | None:
    """Return the first line from which these points cannot be told apart in a plot."""
    for name, line in lines.items():
        shared = points.keys() & line.points.keys()
        if shared and max(abs(points[k] - line.points[k]) for k in shared) <= SAME_LINE * spread:
            return name
    return None


def _layer_caption(metric: str) -> str:
    way = {Direction.HIGHER: "; higher is nearer", Direction.LOWER: "; lower is nearer"}
    nearer = way.get(metric_named(metric).direction, "")
    return f"On held-out answers, in the teacher's frame{nearer}."


def _interpolation_plots(report: ReportData) -> Iterator[Plot]:
    """Yield the loss on the lines between models, with the chords that barriers rise above."""
    paths: dict[str, dict[str, Curve]] = {}
    for step in report.steps:
        for curve in step.curves:
            name = f"{_end(curve.start, step.variant)} to {_end(curve.end, step.variant)}"
            paths.setdefault(step.step, {})[name] = curve
    for step_id, curves in paths.items():
        title = f"{step_id}: between two models"
        svg = svg_of_axes(title, partial(_draw_paths, curves=curves), 2.6 + 0.2 * len(curves))
        barriers = [f"{name}: {_barrier(curve):.3g}" for name, curve in curves.items()]
        caption = f"Dotted: the chord. Barrier, the highest rise above it: {'; '.join(barriers)}."
        yield Plot(title, svg, caption)


def _training_plots(report: ReportData) -> Iterator[Plot]:
    """Yield the loss of each step of training, and the validation KL of each check."""
    for step in report.steps:
        curve = step.training
        if curve is None:
            continue
        loss = f"{TRAINING_LOSSES.get(curve.loss, curve.loss)}, fit texts, each step"
        lines = [
            Line(loss, dict(enumerate(curve.losses)), Role.BEFORE),
            Line("KL, validation texts", dict(zip(curve.checks, curve.validation_kl, strict=True))),
        ]
        title = f"{step.step} ({step.variant}): training"
        draw = partial(draw_lines, lines=lines, x="steps of training", y="nats per token")
        caption = (
            f"The least validation KL, {min(curve.validation_kl):.4g}, is of what was kept, unless "
            "it is the first."
        )
        yield Plot(title, svg_of_axes(title, draw), caption)


def _end(reference: str, variant: str) -> str:
    """Return the name of one end of a path: of `variant`, where the end is the variant itself."""
    return variant if reference == CURVE_OF_VARIANT else reference.removeprefix("run:")


def _chord(curve: Curve) -> list[float]:
    """Return the losses that a straight line from the first to the last loss would have."""
    first, last = curve.losses[0], curve.losses[-1]
    return [(1 - t) * first + t * last for t in curve.positions]


def _barrier(curve: Curve) -> float:
    return max(loss - chord for loss, chord in zip(curve.losses, _chord(curve), strict=True))


def _draw_paths(axes: Axes, curves: Mapping[str, Curve]) -> None:
    for number, (name, curve) in enumerate(curves.items()):
        colour = series_colour(number)
        axes.plot(
            curve.positions,
            curve.losses,
            marker=series_marker(number),
            color=colour,
            label=name,
        )
        # matplotlib leaves labels with an underscore out of the legend.
        axes.plot(curve.positions, _chord(curve), ":", color=colour, label="_chord")
    axes.set_xlabel("share of the second model")
    axes.set_ylabel("KL(teacher ‖ mix), nats per token")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.1)


def _alignment_plots(report: ReportData) -> Iterator[Plot]:
    """Yield what aligners measured at each boundary, then the spectra of their solves."""
    for step_title, measured in report.diagnostics.items():
        layers = measured.layers
        for plot in DIAGNOSTIC_PLOTS:
            lines = []
            for line in plot.lines:
                points = _points(layers, line.field)
                # Zero and less have no place on a logarithmic axis.
                if points and not (plot.log and min(points.values()) <= 0):
                    lines.append(Line(line.label, points, line.role))
            if lines:
                title = f"{step_title}: {plot.title}"
                draw = partial(draw_lines, lines=lines, x=BOUNDARY, y=plot.y_label, log=plot.log)
                yield Plot(title, svg_of_axes(title, draw), plot.caption)
        yield from _spectrum_plot(step_title, layers)


def _points(layers: Mapping[int, LayerDiagnostics], field: str) -> dict[int, float]:
    """Return layer boundary -> value of a `field` or `part.field`, where it was measured."""
    part, _, name = field.rpartition(".")
    points = {}
    for layer, diagnostics in layers.items():
        source: LayerDiagnostics | AssignmentDiagnostics | None = diagnostics
        if part:
            source = getattr(diagnostics, part)
        value = getattr(source, name) if source is not None else None
        if value is not None:
            points[layer] = value
    return points


def _spectrum_plot(step_id: str, layers: Mapping[int, LayerDiagnostics]) -> Iterator[Plot]:
    """Yield the singular values of the solves: of the one solve with its null, or of three."""
    spectra = {
        layer: diagnostics.singular_values
        for layer, diagnostics in layers.items()
        if diagnostics.singular_values
    }
    if not spectra:
        return
    boundaries = sorted(spectra)
    shown = sorted({boundaries[0], boundaries[len(boundaries) // 2], boundaries[-1]})
    lines: dict[str, Sequence[float]] = {f"boundary {layer}": spectra[layer] for layer in shown}
    stages = {layers[layer].stage for layer in spectra} - {None}
    if len(stages) == 1:
        # One map for the whole stream: all boundaries show the same solve.
        null = layers[boundaries[0]].singular_values_shuffled or ()
        lines = {"fitted": spectra[boundaries[0]], NULL_LABEL: null}
    title = f"{step_id}: spectrum"
    caption = (
        "Of the cross moments of student and teacher rows; "
        "where it falls to the null, nothing is shared."
    )
    yield Plot(title, svg_of_axes(title, partial(_draw_spectra, lines=lines)), caption)


def _draw_spectra(axes: Axes, lines: Mapping[str, Sequence[float]]) -> None:
    largest = max(next(iter(lines.values()))[0], 1e-300)
    for number, (name, values) in enumerate(lines.items()):
        axes.loglog(
            range(1, len(values) + 1),
            [max(value / largest, 1e-16) for value in values],
            color=series_colour(number),
            label=name,
        )
    use_plain_powers(axes.xaxis)
    use_plain_powers(axes.yaxis)
    axes.set_xlabel("number of the singular value")
    axes.set_ylabel("share of the largest")
    draw_legend(axes, len(lines))


def _attention_plots(report: ReportData, out: StepOutput) -> Iterator[Plot]:
    """Yield attention maps before and after a permutation of heads, where the step kept them.

    Of the layers whose heads moved; where none did, of one layer.
    """
    for step_title, measured in report.diagnostics.items():
        layers = measured.layers
        kept: list[tuple[int, str, AssignmentDiagnostics]] = []
        for layer, diagnostics in layers.items():
            heads = diagnostics.heads
            if diagnostics.attention is not None and heads is not None and shown_pairs(heads):
                kept.append((layer, diagnostics.attention, heads))
        moved = [entry for entry in kept if entry[2].moved]
        for layer, path, heads in moved or kept[:1]:
            title = f"{step_title}: attention in layer {layer}"
            draw = partial(draw_attention, path=out.committed(path), heads=heads)
            caption = (
                "One text: the teacher, and the student's heads in the same places before and "
                f"after. {heads.moved} moved."
            )
            yield Plot(title, svg_of_figure(title, draw, 4.6), caption)


def _language_plot(report: ReportData) -> Iterator[Plot]:
    """Yield the change of the KL in each language."""
    baseline = report.kl_by_language.get(report.baseline, {})
    changes: dict[str, dict[str, float]] = {}
    for variant, row in report.kl_by_language.items():
        change = {name: row[name].value - baseline[name].value for name in row if name in baseline}
        if any(abs(value) > MIN_LANGUAGE_CHANGE for value in change.values()):
            changes[variant] = change
    if not changes or len(baseline) < 2:
        return
    languages = sorted(baseline)

    def draw(axes: Axes) -> None:
        for number, (variant, change) in enumerate(changes.items()):
            # Points of one language lie next to each other, not on each other.
            shift = 0.5 * ((number + 0.5) / len(changes) - 0.5)
            axes.plot(
                [change.get(name, float("nan")) for name in languages],
                [place + shift for place in range(len(languages))],
                series_marker(number),
                color=series_colour(number),
                label=variant,
            )
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(languages)), languages)
        axes.invert_yaxis()
        axes.set_xlabel(f"change of held-out KL against {report.baseline}, nats per token")
        axes.set_ylabel("language")
        draw_legend(axes, len(changes))

    title = "Change by language"
    svg = svg_of_axes(title, draw, 1.5 + 0.24 * len(baseline))
    yield Plot(title, svg, "Left of the line: nearer to the teacher.")
