"""Report data: every figure and string, computed once. Templates only lay them out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from rotdistill_core.evaluation.acceptance import MORE_TEXTS
from rotdistill_core.evaluation.intervals import (
    Estimate,
    Interval,
    TextFigure,
    estimates,
    figures_by_text,
    paired_change,
)
from rotdistill_core.evaluation.metrics import (
    FAILED,
    Direction,
    in_table_order,
    is_teacher_metric,
    metric_named,
    teacher_metric,
)
from rotdistill_core.evaluation.rows import (
    MetricRow,
    failed_variants,
    overall_figures,
    unprompted_teacher,
)
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.linalg.diagnostics import LayerDiagnostics
from rotdistill_core.recipe.as_toml import resolved_toml
from rotdistill_core.recipe.resolved import ResolvedRecipe
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.output import StepOutput
from rotdistill_core.store.plain import read_text
from rotdistill_core.store.records import MapsRef
from rotdistill_core.store.results import Answer, Caution, Curve, Parity, Remedy, TrainingCurve
from rotdistill_report._alignments import AlignmentTable, alignment_table
from rotdistill_report._provenance import Source, provenance

MIN_TEXTS = 4
"""Texts from which an interval over them says something."""
SHOWN_QUESTIONS = 3
"""Questions whose answers are on the first screen."""
SHARED_NULLS = ("cosine_random", "cosine_mean")
"""Figures of `LayerDiagnostics` that are the same for every map of the same rows."""


@dataclass(frozen=True)
class ShownFigure:
    """A figure of a variant over all texts, and how it is written."""

    value: float
    text: str
    interval: str = ""
    """The figure with its interval; empty where no single texts were measured."""
    change: str = ""
    """Its change against the baseline, with interval where there is one."""
    best: bool = False


class IssueKind(StrEnum):
    """What is wrong with a run."""

    CONTROL = "control"
    """A control stands in for the real thing."""
    NO_RIDGE = "no ridge"
    """A regression is not regularised."""
    CHANCE = "chance"
    """A map is no better than one fitted to shuffled rows."""
    FAILED = "failed"
    """A variant breaks a check."""
    REFUSED = "refused"
    """A step did not apply its own edit."""
    GUARDED = "guarded"
    """The guard allowed a part of an edit only."""
    OVERFITTED = "overfitted"
    """A step learned its texts by heart."""
    NOT_EXACT = "not exact"
    """Exact steps changed the KL."""
    LARGER = "larger"
    """A student that was cut has more parameters than its teacher."""
    WORSE_ALIGNMENT = "worse alignment"
    """A permutation or rotation leaves a layer farther from the teacher."""
    BELOW_MEAN = "below the mean"
    """A map is worse than the teacher's mean in place of every row."""
    WORSE = "worse"
    """A figure got worse, beyond noise."""


@dataclass(frozen=True)
class Advice:
    """What to try next."""

    what: str
    """In words; no sentence end."""
    command: str = ""
    """The whole command; empty where no command does it, or the run's overrides are not known."""


@dataclass(frozen=True)
class Issue:
    """One problem of a run."""

    kind: IssueKind
    subject: str
    """The step or variant."""
    text: str
    advice: list[Advice] = field(default_factory=list)
    """What to try next, the most promising first."""


class Tone(StrEnum):
    """How a verdict is coloured."""

    GOOD = "good"
    BAD = "bad"
    NEUTRAL = "none"


class Verdict(NamedTuple):
    """A conclusion in one sentence."""

    sentence: str
    tone: Tone


@dataclass(frozen=True)
class StepSummary:
    """A step that ran, with the first variant that ran it."""

    step: str
    variant: str
    reused: bool
    seconds: float
    notes: dict[str, Any]
    """What the step noted for people, its certificate and refusal included."""
    refused: str
    """Why it did not apply its edit, no sentence end; empty if it did."""
    curves: list[Curve]
    training: TrainingCurve | None = None
    """Of a step that trained: its losses."""
    cautions: list[Caution] = field(default_factory=list)
    """What speaks against the edit that it applied."""
    remedies: tuple[Remedy, ...] = ()
    """What to try next where it did not apply its edit."""


@dataclass(frozen=True)
class StepDiagnostics:
    """What one alignment step measured."""

    step: str
    """Id of the step."""
    layers: dict[int, LayerDiagnostics]
    """Layer boundary -> figures."""


@dataclass(frozen=True)
class ReportData:
    """The content of a report. Its last nine fields come from `_findings.with_findings`."""

    recipe_name: str
    run: str
    baseline: str
    """The variant that others are compared with."""
    figures: dict[str, dict[str, ShownFigure]]
    """Variant -> metric -> figure."""
    failures: dict[str, list[str]]
    """Variant -> the checks that it breaks."""
    estimates: dict[str, dict[str, Estimate]]
    """Metric -> variant -> intervals."""
    kl_by_language: dict[str, dict[str, ShownFigure]]
    """Variant -> language -> held-out KL."""
    layer_curves: dict[str, dict[str, dict[int, float]]]
    """Metric -> variant -> layer boundary -> figure."""
    diagnostics: dict[str, StepDiagnostics]
    """Title of an alignment step, unique in the report -> what that step measured."""
    steps: list[StepSummary]
    answers: dict[str, dict[str, Answer]]
    """Variant -> question id -> the answers of teacher and variant."""
    answer_variants: list[str]
    """The variants whose answers are shown: baseline and headline."""
    first_questions: list[str]
    """Ids of the questions on the first screen, which `evenly_spaced` takes."""
    provenance: dict[str, Mapping[str, str | Source]]
    """Models, texts, recipe and versions that had a part in the run."""
    recipe_text: str
    """The resolved recipe, as TOML that runs."""
    saved_as: str
    """Name of the dtype of the checkpoints; empty where it is not known."""
    parity: dict[str, Parity]
    """Variant -> how it compares with transformers."""
    model_parity: dict[str, Parity]
    """The same for each opened model, and after each step that cuts."""
    teacher_parameters: int | None = None
    """None where the models were not opened."""
    is_cut: bool = False
    """Whether the student is made from its teacher alone."""
    lessons: Mapping[str, Any] | None = None
    """What `lessons.json` says of the texts that the teacher wrote; None without lessons."""
    more_lessons: Advice | None = None
    """How to give the run more texts to fit on."""
    next_step: Advice | None = None
    """The one thing to do next."""
    verdict: str = ""
    """In one sentence: whether the run worked."""
    tone: Tone = Tone.NEUTRAL
    answer_verdict: str = ""
    """In one sentence: whether the headline answers better than the baseline; empty if unknown."""
    answer_tone: Tone = Tone.NEUTRAL
    issues: list[Issue] = field(default_factory=list)
    ablations: list[str] = field(default_factory=list)
    """In words: what the steps of each variant changed."""
    language_summary: list[str] = field(default_factory=list)
    """In words: in which languages each variant gains most and least."""
    answer_summary: list[str] = field(default_factory=list)
    """In words: whether length, language, chrF and facts of the answers move to the teacher's."""

    @property
    def alignments(self) -> dict[str, AlignmentTable]:
        """Title of an alignment step -> the table of its figures, where there are any."""
        tables = {title: alignment_table(each.layers) for title, each in self.diagnostics.items()}
        return {title: table for title, table in tables.items() if table.rows or table.remarks}

    @property
    def metrics(self) -> list[str]:
        """The metrics of the table of variants, known ones first."""
        measured = (metric for row in self.figures.values() for metric in row)
        return in_table_order(m for m in measured if m != FAILED and not is_teacher_metric(m))

    @property
    def unanswered(self) -> list[str]:
        """The variants without answers, where others have some: their cells are empty."""
        if not self.answers:
            return []
        return [variant for variant in self.figures if variant not in self.answers]

    @property
    def unprompted_teacher(self) -> dict[str, ShownFigure]:
        """Metric -> figure of the teacher without its system prompt, compared with itself.

        Empty unless the prompt is baked in: then it is what the prompt's absence costs at first.
        """
        values = {
            variant: {metric: shown.value for metric, shown in row.items()}
            for variant, row in self.figures.items()
        }
        shown: dict[str, ShownFigure] = {}
        for metric, value in unprompted_teacher(values).items():
            of_variants = self.estimates.get(teacher_metric(metric), {})
            own = next((each.own for each in of_variants.values()), None)
            shown[metric] = ShownFigure(
                value=value,
                text=format(value, metric_named(metric).format),
                interval=with_interval(own, metric) if own else "",
            )
        return shown

    @property
    def languages(self) -> list[str]:
        """The languages in which the held-out KL was measured."""
        return sorted({language for row in self.kl_by_language.values() for language in row})

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values; a number that is not finite becomes text."""
        return {name: _json_value(value) for name, value in vars(self).items()}

    @property
    def saved_in_full_precision(self) -> bool:
        """Whether checkpoints have 32 bits or more, so that rounding explains no change."""
        return self.saved_as in ("float32", "float64")


def _json_value(value: Any) -> Any:
    if isinstance(value, LayerDiagnostics):
        return _json_value(value.as_dict())
    if isinstance(value, StepDiagnostics):
        return _json_value(value.layers)
    if isinstance(value, Source):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return _json_value(asdict(value))
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    return value


def collect(recipe: ResolvedRecipe, outcome: RunResult, out: StepOutput) -> ReportData:
    """Return the data of a run's report, without its findings."""
    # Rows that were read back from results.jsonl hold text where a value is not finite.
    rows = [row._replace(value=float(row.value)) for row in outcome.rows]
    baseline = recipe.baseline
    seed = recipe.recipe.seed
    found = estimates(rows, baseline, seed)
    unexplained = {name: ["it broke a check when it was made."] for name in failed_variants(rows)}
    answers = {
        variant: result.report.answers
        for (variant, _), result in outcome.steps.items()
        if result.report.answers
    }
    answered = [variant for variant in recipe.recipe.variants if variant in answers]
    compared = answer_variants(answered, baseline, recipe.headline)
    questions = list(answers[compared[0]]) if compared else []
    return ReportData(
        recipe_name=recipe.recipe.name,
        run=outcome.folder.name,
        baseline=baseline,
        figures=figure_table(overall_figures(rows), found, baseline),
        failures=unexplained | outcome.failed,
        estimates=found,
        kl_by_language=kl_by_language(rows, baseline, seed),
        layer_curves=layer_curves(rows),
        diagnostics=alignment_diagnostics(outcome, out),
        steps=step_summaries(outcome),
        answers=answers,
        answer_variants=compared,
        first_questions=evenly_spaced(questions, SHOWN_QUESTIONS),
        provenance=provenance(recipe, outcome),
        recipe_text=resolved_toml(recipe),
        saved_as=_save_dtype(recipe, outcome),
        parity=outcome.parity,
        model_parity={**outcome.model_parity, **cut_parities(outcome)},
        teacher_parameters=outcome.pair.teacher.weights.parameters if outcome.pair else None,
        is_cut=bool(outcome.pair and outcome.pair.same),
        lessons=written_lessons(recipe, outcome, out),
        more_lessons=advice_of(MORE_TEXTS.what, outcome.more_lessons, recipe),
    )


def advice_of(what: str, sets: Sequence[str], recipe: ResolvedRecipe) -> Advice:
    """Return advice with the command that runs the recipe with some overrides, if there are any."""
    command = recipe.command(sets) if sets else ""
    if sets and not command:
        return Advice(Remedy(what, tuple(sets)).text)
    return Advice(what, command)


def written_lessons(
    recipe: ResolvedRecipe, outcome: RunResult, out: StepOutput
) -> Mapping[str, Any] | None:
    """Return what the run's folder says of its lessons; None if the recipe asks for none."""
    if not recipe.recipe.lessons.count:
        return None
    path = out.committed(f"{outcome.folder.name}/{RunLayout.LESSONS}")
    found: dict[str, Any] = json.loads(read_text(path))
    return found


def _save_dtype(recipe: ResolvedRecipe, outcome: RunResult) -> str:
    dtype: str = recipe.recipe.student.save_dtype
    for folder in outcome.checkpoints.values():
        dtype = str(json.loads(read_text(folder / RunLayout.CONFIG))["dtype"])
    return dtype if dtype != "auto" else ""


def with_interval(interval: Interval, metric: str, sign: str = "") -> str:
    """Return a figure with its interval as text, `0.590 [0.520, 0.661]`.

    `sign="+"` writes the sign of positive numbers too.
    """
    specification = f"{sign}{metric_named(metric).interval_format}"
    value = _without_sign_of_zero(format(interval.value, specification))
    if math.isnan(interval.low):
        return value
    low = _without_sign_of_zero(format(interval.low, specification))
    high = _without_sign_of_zero(format(interval.high, specification))
    return f"{value} [{low}, {high}]"


def million(parameters: float) -> str:
    """Return a number of parameters in millions as text: `134.5`."""
    return f"{parameters / 1e6:,.1f}" if parameters >= 1e5 else f"{parameters / 1e6:.1g}"


def _without_sign_of_zero(number: str) -> str:
    rounds_to_zero = not number.strip("+-0.")
    return number.lstrip("+-") if rounds_to_zero else number


def figure_table(
    overall: Mapping[str, Mapping[str, float]],
    found: Mapping[str, Mapping[str, Estimate]],
    baseline: str,
) -> dict[str, dict[str, ShownFigure]]:
    """Return the table of variants, metric by metric.

    Figures that look alike are equally good. One that is not finite is shown, and never the best.
    A figure is the best only where the choice of texts does not explain it.
    """
    best = _best_figures(overall)
    table: dict[str, dict[str, ShownFigure]] = {}
    for variant, row in overall.items():
        table[variant] = {}
        for name, value in row.items():
            text = format(value, metric_named(name).format)
            estimate = found.get(name, {}).get(variant)
            change = ""
            if estimate and estimate.change:
                change = with_interval(estimate.change, name, "+")
            elif variant != baseline and name in overall.get(baseline, {}):
                change = _change_without_interval(name, value, overall[baseline][name])
            table[variant][name] = ShownFigure(
                value=value,
                text=text,
                interval=with_interval(estimate.own, name) if estimate else "",
                change=change,
                best=best.get(name) == text and _is_beyond_noise(found.get(name, {}), variant),
            )
    return table


def _is_beyond_noise(of_variants: Mapping[str, Estimate], variant: str) -> bool:
    """Return whether a figure differs from the baseline's beyond noise, as far as that is known.

    That of the baseline itself does if those of all others do.
    """
    own = of_variants.get(variant)
    if own is not None and own.change is not None:
        return own.change.beyond_noise()
    changes = [each.change for each in of_variants.values() if each.change is not None]
    return all(change.beyond_noise() for change in changes)


def _best_figures(overall: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Return metric -> the best figure as text, where variants differ and one way is better."""
    best: dict[str, str] = {}
    for name in {name for row in overall.values() for name in row}:
        metric = metric_named(name)
        values = [row[name] for row in overall.values() if name in row]
        finite = [value for value in values if math.isfinite(value)]
        different = {format(value, metric.format) for value in finite}
        if metric.direction is not Direction.NEITHER and len(different) > 1:
            extreme = max(finite) if metric.direction is Direction.HIGHER else min(finite)
            best[name] = format(extreme, metric.format)
    return best


def _change_without_interval(name: str, value: float, baseline_value: float) -> str:
    metric = metric_named(name)
    if metric.direction is Direction.NEITHER:
        return ""
    return _without_sign_of_zero(format(value - baseline_value, f"+{metric.format}"))


def kl_by_language(
    rows: Sequence[MetricRow], baseline: str, seed: int
) -> dict[str, dict[str, ShownFigure]]:
    """Return variant -> language -> held-out KL, with its change on the texts of that language."""
    kl_rows = [row for row in rows if row.metric == "kl"]
    language_of = {row.text: row.language for row in kl_rows if row.text}
    texts = figures_by_text(kl_rows).get("kl", {})

    def in_language(variant: str, language: str) -> dict[str, TextFigure]:
        figures = texts.get(variant, {}).items()
        return {text: figure for text, figure in figures if language_of[text] == language}

    table: dict[str, dict[str, ShownFigure]] = {}
    for row in kl_rows:
        if not row.language or row.text is not None:
            continue
        change = None
        if row.variant != baseline:
            measured = in_language(row.variant, row.language)
            reference = in_language(baseline, row.language)
            change = paired_change(measured, reference, seed)
            if change and len(measured) < MIN_TEXTS:
                change = Interval(change.value, math.nan, math.nan)
        table.setdefault(row.variant, {})[row.language] = ShownFigure(
            value=row.value,
            text=f"{row.value:.3f}",
            change=with_interval(change, "kl", "+") if change else "",
        )
    return table


def layer_curves(rows: Iterable[MetricRow]) -> dict[str, dict[str, dict[int, float]]]:
    """Return metric -> variant -> layer boundary -> figure, of the rows about one layer."""
    curves: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        if row.layer is not None and row.text is None:
            curves.setdefault(row.metric, {}).setdefault(row.variant, {})[row.layer] = row.value
    return curves


def alignment_diagnostics(outcome: RunResult, out: StepOutput) -> dict[str, StepDiagnostics]:
    """Return title -> what an alignment step measured, each solved step once.

    An aligner stores the figures of its predecessors again. Those are left out of its own, but for
    the nulls that are the same for every map: they belong to each cosine.
    """
    files = _diagnostics_files(out)
    diagnostics: dict[str, StepDiagnostics] = {}
    collected: set[str] = set()
    known_of_variant: dict[str, set[tuple[int, str, str]]] = {}
    for (variant, step), result in outcome.steps.items():
        if not files.get(result.key):
            continue
        known = known_of_variant.setdefault(variant, set())
        new: dict[int, dict[str, Any]] = {}
        stored: set[tuple[int, str, str]] = set()
        for layer, path in sorted(files[result.key].items()):
            document = json.loads(read_text(out.committed(path)))
            document.pop("map", None)  # where the map lies, which is no figure
            figures = {(layer, name, str(value)): value for name, value in document.items()}
            new[layer] = {key[1]: value for key, value in figures.items() if key not in known}
            if "cosine_after" in new[layer]:
                new[layer] |= {name: document[name] for name in SHARED_NULLS if name in document}
            stored |= figures.keys()
        known |= stored
        if result.key not in collected:
            collected.add(result.key)
            title = step if step not in diagnostics else f"{step} ({variant})"
            layers = {layer: LayerDiagnostics.from_dict(figures) for layer, figures in new.items()}
            diagnostics[title] = StepDiagnostics(step, layers)
    return diagnostics


def _diagnostics_files(out: StepOutput) -> dict[str, dict[int, str]]:
    """Return step key -> layer boundary -> file of its diagnostics, relative to all runs."""
    return {
        record.key: {int(layer): path for layer, path in record.result.cards.items()}
        for record in out.ledger.steps
        if isinstance(record.result, MapsRef)
    }


def cut_parities(outcome: RunResult) -> dict[str, Parity]:
    """Return how the models that steps have cut compare with transformers."""
    return {
        f"after {step}": result.report.parity
        for (_, step), result in outcome.steps.items()
        if result.report.parity
    }


def step_summaries(outcome: RunResult) -> list[StepSummary]:
    """Return the steps that ran, each once."""
    summaries: dict[str, StepSummary] = {}
    for (variant, step), result in outcome.steps.items():
        if result.key in summaries:
            continue
        report = result.report
        notes = dict(result.notes)
        if report.certificate:
            notes["certificate"] = asdict(report.certificate)
        if report.refused:
            notes["refused"] = report.refusal
        summaries[result.key] = StepSummary(
            step=step,
            variant=variant,
            reused=result.reused,
            seconds=result.seconds,
            notes=notes,
            refused=report.refused,
            curves=report.curves,
            training=report.training,
            cautions=report.cautions,
            remedies=report.remedies,
        )
    return list(summaries.values())


def answer_variants(answered: Sequence[str], baseline: str, headline: str) -> list[str]:
    """Return the one or two variants whose answers are shown, of those that have answered."""
    if not answered:
        return []
    first = baseline if baseline in answered else answered[0]
    last = headline if headline in answered else answered[-1]
    return list(dict.fromkeys([first, last]))


def evenly_spaced(questions: Sequence[str], count: int) -> list[str]:
    """Return at most `count` questions: the first, and others at equal distances after it.

    The choice depends on nothing but their order, so that no answer is shown for being good.
    """
    shown = min(count, len(questions))
    return [questions[k * len(questions) // shown] for k in range(shown)]
