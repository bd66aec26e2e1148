"""Findings: what the figures of a run mean, in words.

Whether the run worked, why it is not to be trusted, what to look at and to do next, what the steps
of each variant changed.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from rotdistill_core.evaluation.intervals import (
    FiguresByText,
    Interval,
    figures_by_text,
    paired_change,
)
from rotdistill_core.evaluation.metrics import METRICS, is_teacher_metric, metric_named
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.linalg.diagnostics import AssignmentDiagnostics, LayerDiagnostics
from rotdistill_core.plugin.caveats import CaveatKind
from rotdistill_core.plugin.step import caveats_of, is_exact, options_of
from rotdistill_core.recipe.resolved import RecipeStep, ResolvedRecipe
from rotdistill_core.store.results import CautionKind
from rotdistill_report._answer_summary import answer_summary, answer_verdict
from rotdistill_report._data import (
    Advice,
    Issue,
    IssueKind,
    ReportData,
    ShownFigure,
    Tone,
    Verdict,
    advice_of,
    million,
    with_interval,
)

MIN_RELATIVE_CHANGE = 0.01
"""Share of the baseline's figure from which a change is worth an issue."""
EXACT_KL_TOLERANCE = 1e-3
"""Nats by which exact steps may change the KL; float32 rounding is far below."""
MIN_LANGUAGE_GAIN = 10 * EXACT_KL_TOLERANCE
"""Nats from which gains by language are worth a line."""
COSINE_TOLERANCE = 1e-3
SCORE_TOLERANCE = 1e-6
SHOWN_AS_ZERO = 5e-4
"""A change below it is written as zero, so `within noise` goes without saying."""
ABLATION_METRICS = (
    "kl",
    "guard_kl",
    "top1",
    "answer_chrf",
    "factual_completeness",
    "hallucination_rate",
)
"""Metrics that the steps of a variant are compared by; those of other evaluators follow."""
ISSUES_OF_CAVEATS = {
    CaveatKind.CONTROL: IssueKind.CONTROL,
    CaveatKind.NO_RIDGE: IssueKind.NO_RIDGE,
}
"""Kind of a step's caveat -> the issue that the report makes of it; other kinds make none."""


DISTRUST = (IssueKind.CONTROL, IssueKind.NO_RIDGE, IssueKind.CHANCE, IssueKind.NOT_EXACT)
"""Kinds of issues that come before any remedy for a figure."""


def with_findings(report: ReportData, recipe: ResolvedRecipe, outcome: RunResult) -> ReportData:
    """Return the report with its findings."""
    warnings = list(validity_warnings(report, recipe))
    figures = figures_by_text(outcome.rows)
    of_answers = answer_verdict(report, figures, recipe.recipe.seed)
    doubts = [*learned_by_heart(report), *of_answers.doubts]
    conclusion = verdict(report, recipe, warnings, figures.get("kl", {}), doubts)
    issues = [*warnings, *collect_issues(report, recipe)]
    return replace(
        report,
        verdict=conclusion.sentence,
        tone=conclusion.tone,
        answer_verdict=of_answers.sentence,
        answer_tone=of_answers.tone,
        issues=issues,
        next_step=next_step(report, recipe, outcome, issues, conclusion.tone),
        ablations=list(ablation_effects(report, recipe, outcome)),
        language_summary=language_summary(report.kl_by_language, report.baseline),
        answer_summary=answer_summary(report.estimates, report.answer_variants),
    )


# Why a run is not to be trusted.


def validity_warnings(report: ReportData, recipe: ResolvedRecipe) -> Iterator[Issue]:
    """Yield why the run is not to be trusted: controls, missing ridges, maps at chance level."""
    edited = {
        name
        for name in recipe.recipe.variants
        if any(step.stage in ("align", "fold", "style") for step in recipe.chain(name))
    } - {report.baseline}
    for recipe_step in recipe.steps:
        variants = {name for name in recipe.recipe.variants if recipe_step in recipe.chain(name)}
        for kind, text in caveats_of(recipe_step.step):
            # A variant without the control, next to one with it, is what a control is for.
            relevant = edited <= variants if kind is CaveatKind.CONTROL else bool(variants)
            if relevant and kind in ISSUES_OF_CAVEATS:
                yield Issue(ISSUES_OF_CAVEATS[kind], recipe_step.id, text)
    yield from _chance_warnings(report, recipe)


def _chance_warnings(report: ReportData, recipe: ResolvedRecipe) -> Iterator[Issue]:
    """Yield the alignments that are no better than chance at half of their boundaries or more."""
    on_purpose = _random_on_purpose(recipe)
    for title, measured in report.diagnostics.items():
        compared = 0
        at_chance = 0
        for diagnostics in measured.layers.values():
            fitted, chance = diagnostics.cosine_after, diagnostics.cosine_shuffled
            if fitted is not None and chance is not None:
                compared += 1
                at_chance += not fitted > chance
        if compared and 2 * at_chance >= compared and measured.step not in on_purpose:
            text = f"at {at_chance} of {compared} boundaries its map is no better than one fitted "
            yield Issue(IssueKind.CHANCE, title, text + "to shuffled rows.")


def _random_on_purpose(recipe: ResolvedRecipe) -> set[str]:
    """Return the ids of the steps whose maps are random, as a control."""
    return {
        step.id
        for step in recipe.steps
        if any(caveat.kind is CaveatKind.RANDOM_MAP for caveat in caveats_of(step.step))
    }


# What to look at, and what to do next.


def collect_issues(report: ReportData, recipe: ResolvedRecipe) -> Iterator[Issue]:
    """Yield what failed, was refused or got worse, the gravest first."""
    for variant, failures in report.failures.items():
        for failure in failures:
            yield Issue(IssueKind.FAILED, variant, failure)
    for step in report.steps:
        if step.refused:
            advice = [advice_of(each.what, each.sets, recipe) for each in step.remedies]
            subject = f"{step.step} (in {step.variant})"
            yield Issue(IssueKind.REFUSED, subject, f"{step.refused}.", advice)
    for step in report.steps:
        for caution in step.cautions:
            kind = IssueKind(caution.kind.value)
            advice = [advice_of(each.what, each.sets, recipe) for each in caution.remedies]
            subject = f"{step.step} (in {step.variant})"
            yield Issue(kind, subject, f"{caution.reason}.", advice)
    if report.saved_in_full_precision:
        yield from _inexact_variants(report, recipe)
    yield from larger_than_teacher(report)
    yield from alignment_issues(report, recipe)
    yield from _worse_figures(report)


def learned_by_heart(report: ReportData) -> list[str]:
    """Return in words which steps learned their texts by heart."""
    by_heart = [
        step.step
        for step in report.steps
        if any(caution.kind is CautionKind.OVERFITTED for caution in step.cautions)
    ]
    return [f"`{name}` has learned its texts by heart" for name in dict.fromkeys(by_heart)]


def next_step(
    report: ReportData,
    recipe: ResolvedRecipe,
    outcome: RunResult,
    issues: Sequence[Issue],
    tone: Tone,
) -> Advice:
    """Return the one thing to do next, with its command.

    The first remedy of the gravest issue that has one; else more texts to fit on where the run left
    something to wish for; else to talk with the headline variant.

    Args:
        report: the figures.
        recipe: the run's recipe.
        outcome: what the run made.
        issues: what is to look at.
        tone: of the verdict.
    """
    run = outcome.folder.name
    look = Advice("look at its steps and failures", shlex.join(["rotdistill", "show", run]))
    if report.failures or any(issue.kind in DISTRUST for issue in issues):
        return look
    by_rank = sorted(issues, key=lambda issue: issue.kind is not IssueKind.OVERFITTED)
    for advice in (each for issue in by_rank for each in issue.advice):
        if advice.command:
            return advice
    # Steps that learn from texts have a guard; a cut has none.
    learns = any("guard" in options_of(step.step) for step in recipe.chain(recipe.headline))
    if tone is not Tone.GOOD and learns and report.more_lessons and report.more_lessons.command:
        return report.more_lessons
    asked = [name for name in (report.baseline, recipe.headline) if name in outcome.checkpoints]
    if not asked:
        return look
    variants = [word for name in dict.fromkeys(asked) for word in ("--variant", name)]
    words = shlex.join(["rotdistill", "chat", run, *variants])
    return Advice("ask it something yourself", words)


def _inexact_variants(report: ReportData, recipe: ResolvedRecipe) -> Iterator[Issue]:
    """Yield the variants whose KL moves although all their steps are exact."""
    baseline_kl = report.figures.get(report.baseline, {}).get("kl")
    for variant, row in report.figures.items():
        if baseline_kl is None or "kl" not in row:
            continue
        exact = not chain_difference(recipe, variant, report.baseline).inexact
        change = row["kl"].value - baseline_kl.value
        if exact and not abs(change) <= EXACT_KL_TOLERANCE:
            text = f"it has exact steps only, yet its KL changes by {change:+.4f}: "
            yield Issue(IssueKind.NOT_EXACT, variant, text + "that is an error of the program.")


def larger_than_teacher(report: ReportData) -> Iterator[Issue]:
    """Yield the variants of a student that was cut which end larger than its teacher."""
    teacher = report.teacher_parameters
    sizes = {
        variant: row["parameters"].value
        for variant, row in report.figures.items()
        if "parameters" in row
    }
    if not report.is_cut or teacher is None or not any(n < teacher for n in sizes.values()):
        return
    for variant, size in sizes.items():
        if size > teacher:
            yield Issue(
                IssueKind.LARGER,
                variant,
                f"was cut, and has {million(size)} million parameters where its teacher has "
                f"{million(teacher)}: a head of its own adds them. Steps that fit the head or fuse "
                "norm gains write one; without them it stays tied to the embedding.",
            )


def alignment_issues(report: ReportData, recipe: ResolvedRecipe) -> Iterator[Issue]:
    """Yield the alignments whose maps are worse than a constant, or than none."""
    on_purpose = _random_on_purpose(recipe)
    for title, measured in report.diagnostics.items():
        if measured.step not in on_purpose:
            for text in maps_below_the_mean(measured.layers):
                advice = _advice_for_maps(report, recipe, measured.step)
                yield Issue(IssueKind.BELOW_MEAN, title, text, advice)
        for text in worse_alignments(measured.layers):
            yield Issue(IssueKind.WORSE_ALIGNMENT, title, text)


def maps_below_the_mean(layers: Mapping[int, LayerDiagnostics]) -> Iterator[str]:
    """Yield in words where a map is worse than the teacher's mean in place of every row."""
    cosines = {
        i: Drop(card.cosine_mean, card.cosine_after)
        for i, card in layers.items()
        if card.cosine_mean is not None and card.cosine_after is not None
    }
    drops = {i: d for i, d in cosines.items() if d.after < d.before - COSINE_TOLERANCE}
    if drops:
        layer, largest = _largest_drop(drops)
        yield (
            f"its map is worse than the teacher's mean in place of every row, at {len(drops)} of "
            f"{len(cosines)} layers, most at layer {layer}: cosine {largest.after:.3f}, of the "
            f"mean {largest.before:.3f}. What is fitted through this map learns less than a "
            "constant."
        )


def _advice_for_maps(report: ReportData, recipe: ResolvedRecipe, aligner: str) -> list[Advice]:
    """Return what may help an aligner whose maps learn nothing."""
    advice = [report.more_lessons] if report.more_lessons else []
    options = next((options_of(each.step) for each in recipe.steps if each.id == aligner), {})
    if options.get("tie", 1) != 1:
        advice.append(advice_of("maps for fewer layers each", [f"{aligner}.tie=1"], recipe))
    return [*advice, Advice("another aligner")]


def worse_alignments(layers: Mapping[int, LayerDiagnostics]) -> Iterator[str]:
    """Yield in words where a map leaves layers farther from the teacher than they were."""
    assignments: dict[str, dict[int, AssignmentDiagnostics]] = {
        "heads": {i: card.heads for i, card in layers.items() if card.heads},
        "neurons": {i: card.neurons for i, card in layers.items() if card.neurons},
    }
    for part, matched in assignments.items():
        drops = {
            i: Drop(each.identity_score, each.score)
            for i, each in matched.items()
            if each.score < each.identity_score - SCORE_TOLERANCE
        }
        if drops:
            places = _places(drops, len(matched))
            yield f"the permutation of {part} matches worse than leaving them in place {places}."
    cosines = {
        i: Drop(card.cosine_before, card.cosine_after)
        for i, card in layers.items()
        if card.cosine_before is not None and card.cosine_after is not None
    }
    drops = {i: d for i, d in cosines.items() if d.after < d.before - COSINE_TOLERANCE}
    if drops:
        yield (
            f"the rotation lowers the cosine to the teacher {_places(drops, len(cosines))}. "
            "This is expected where the student shares layers with the teacher; "
            "folding it exactly changes no logit."
        )


class Drop(NamedTuple):
    """A figure of a layer that an alignment changes."""

    before: float
    after: float


def _places(drops: Mapping[int, Drop], measured: int) -> str:
    """Return at how many layers a figure drops, and where most."""
    layer, largest = _largest_drop(drops)
    count = f"at {len(drops)} of {measured} layers"
    return f"{count}, most at layer {layer}: from {largest.before:.3f} to {largest.after:.3f}"


def _largest_drop(drops: Mapping[int, Drop]) -> tuple[int, Drop]:
    """Return the layer with the largest drop, and that drop."""
    return max(drops.items(), key=lambda item: item[1].before - item[1].after)


def _worse_figures(report: ReportData) -> Iterator[Issue]:
    """Yield every figure that got worse beyond noise, and by more than rounding of its size."""
    baseline_row = report.figures.get(report.baseline, {})
    for variant, row in report.figures.items():
        for metric in row:
            estimate = report.estimates.get(metric, {}).get(variant)
            change = estimate.change if estimate else None
            if change is None or not change.beyond_noise():
                continue
            baseline_value = baseline_row[metric].value if metric in baseline_row else 0.0
            relevant = abs(change.value) > MIN_RELATIVE_CHANGE * abs(baseline_value)
            if relevant and change.value * metric_named(metric).direction < 0:
                changed = with_interval(change, metric, "+")
                text = f"{metric_named(metric).title} changed by {changed} "
                yield Issue(IssueKind.WORSE, variant, text + f"against {report.baseline}.")


# Steps of variants.


class ChainDifference(NamedTuple):
    """How the steps of a variant differ from those of another."""

    added: list[str]
    """Steps that only the first variant has."""
    inexact: list[str]
    """Steps that only one of the two has, and that change what the model computes."""


def chain_difference(recipe: ResolvedRecipe, variant: str, other: str) -> ChainDifference:
    """Return how the steps of `variant` differ from those of `other`, evaluation apart.

    A variant that the recipe does not name, `round-trip`, counts as an inexact step of its own.
    """
    if variant not in recipe.recipe.variants:
        return ChainDifference(added=[], inexact=[variant])
    chain = _edits(recipe, variant)
    other_chain = _edits(recipe, other) if other in recipe.recipe.variants else []
    added = [step for step in chain if step not in other_chain]
    missing = [step for step in other_chain if step not in chain]
    inexact = [step.id for step in [*added, *missing] if _changes_model(step)]
    return ChainDifference(added=[step.id for step in added], inexact=inexact)


def _edits(recipe: ResolvedRecipe, variant: str) -> list[RecipeStep]:
    return [step for step in recipe.chain(variant) if step.stage != "evaluate"]


def _changes_model(recipe_step: RecipeStep) -> bool:
    """Return whether a step may change what the model computes, or what later steps see of it."""
    if recipe_step.stage == "style":
        return True
    return recipe_step.stage in ("fold", "capture") and not is_exact(recipe_step.step)


# Whether the run worked.


def verdict(
    report: ReportData,
    recipe: ResolvedRecipe,
    warnings: list[Issue],
    kl: Mapping[str, FiguresByText],
    doubts: Sequence[str] = (),
) -> Verdict:
    """Return in one sentence whether the run worked.

    Args:
        report: the figures.
        recipe: the run's recipe.
        warnings: why it is not to be trusted.
        kl: variant -> held-out KL of each text.
        doubts: what speaks against a lower KL, in words; it is said in the same breath.
    """
    if warnings:
        first = warnings[0]
        return Verdict(f"Not to be trusted: `{first.subject}`: {first.text}", Tone.BAD)
    if report.failures:
        variant, failures = next(iter(report.failures.items()))
        count = len(report.failures)
        more = f" {count} variants failed." if count > 1 else ""
        return Verdict(f"Failed: `{variant}` breaks a check: {failures[0]}{more}", Tone.BAD)
    changes = {
        variant: estimate.change
        for variant, estimate in report.estimates.get("kl", {}).items()
        if estimate.change and variant in recipe.recipe.variants
    }
    if not changes:
        sentence = "Nothing to compare: the run has no second variant with a KL to the teacher."
        return Verdict(sentence, Tone.NEUTRAL)
    return _verdict_of_changes(report, recipe, changes, kl, doubts)


def _verdict_of_changes(
    report: ReportData,
    recipe: ResolvedRecipe,
    changes: Mapping[str, Interval],
    kl: Mapping[str, FiguresByText],
    doubts: Sequence[str],
) -> Verdict:
    measured = report.estimates["kl"]
    reference = report.baseline if report.baseline in measured else next(iter(measured))
    unchanged = all(abs(change.value) <= EXACT_KL_TOLERANCE for change in changes.values())
    exact = not any(chain_difference(recipe, v, reference).inexact for v in changes)
    if exact and not report.saved_in_full_precision:
        sentence = (
            f"Exact steps only: what differs from `{reference}` is rounding of the "
            f"{report.saved_as} files."
        )
        return Verdict(sentence, Tone.GOOD)
    if exact and unchanged:
        sentence = f"Exact steps only: every variant scores as `{reference}`, as it must."
        return Verdict(sentence, Tone.GOOD)
    best = min(changes, key=lambda variant: changes[variant].value)
    if not (changes[best].beyond_noise() and changes[best].value < 0):
        sentence = f"It did not work: no variant is nearer to the teacher than `{reference}` "
        return Verdict(sentence + "by more than the choice of texts explains.", Tone.BAD)
    better = [v for v in changes if changes[v].beyond_noise() and changes[v].value < 0]
    named = smallest_of_equals(report, best, better, kl, recipe.recipe.seed)
    place = "nearest to the teacher"
    if named != best:
        place = f"as near to the teacher as `{best}`, which is larger"
    row, reference_row = report.figures[named], report.figures[reference]
    worked = "It worked in part" if doubts else "It worked"
    sentence = (
        f"{worked}: `{named}` is {place}, with a held-out KL of "
        f"{row['kl'].text} nats per token instead of {reference_row['kl'].text} "
        f"({with_interval(changes[named], 'kl', '+')})."
    )
    if "parameters" in row and report.teacher_parameters:
        own, teacher = million(row["parameters"].value), million(report.teacher_parameters)
        sentence += f" It has {own} million parameters, the teacher {teacher} million."
    if "guard_kl" in row and "guard_kl" in reference_row:
        before, after = reference_row["guard_kl"].text, row["guard_kl"].text
        sentence += f" Outside the domain the KL went from {before} to {after}."
    if doubts:
        return Verdict(f"{sentence} But {'; '.join(doubts)}.", Tone.NEUTRAL)
    return Verdict(sentence, Tone.GOOD)


def smallest_of_equals(
    report: ReportData,
    best: str,
    others: Sequence[str],
    kl: Mapping[str, FiguresByText],
    seed: int,
) -> str:
    """Return the smallest of the variants that are as near to the teacher as the best one.

    Those are as near whose paired difference from it has an interval that holds 0. Of equal sizes
    the best one stays.
    """

    def size(variant: str) -> float:
        row = report.figures[variant]
        return row["parameters"].value if "parameters" in row else math.inf

    smallest = best
    for variant in others:
        if variant == best or variant not in kl or best not in kl:
            continue
        change = paired_change(kl[variant], kl[best], seed)
        if change and not change.beyond_noise() and size(variant) < size(smallest):
            smallest = variant
    return smallest


# What the steps of each variant changed.


def ablation_effects(
    report: ReportData, recipe: ResolvedRecipe, outcome: RunResult
) -> Iterator[str]:
    """Yield in words what each variant changes against the largest variant that it contains."""
    texts = figures_by_text(outcome.rows)
    others = [name for name in texts if name not in METRICS and not is_teacher_metric(name)]
    steps = {
        variant: {step.id for step in _edits(recipe, variant)}
        for variant in recipe.recipe.variants
        if variant in report.figures
    }
    for variant in steps:
        contained = [other for other in steps if steps[other] < steps[variant]]
        if not contained:
            continue
        parent = max(contained, key=lambda other: len(steps[other]))
        effects = []
        for metric in (*ABLATION_METRICS, *others):
            measured = texts.get(metric, {}).get(variant)
            reference = texts.get(metric, {}).get(parent)
            if measured and reference:
                change = paired_change(measured, reference, recipe.recipe.seed)
                effects += [_effect(metric, change)] if change else []
        difference = chain_difference(recipe, variant, parent)
        changed = "; ".join(effects) or "nothing was measured on both"
        exact = "" if difference.inexact else _exactness(report, outcome, variant, difference.added)
        yield f"`{variant}` = `{parent}` + {', '.join(difference.added)}: {changed}.{exact}"


def _exactness(report: ReportData, outcome: RunResult, variant: str, added: Sequence[str]) -> str:
    """Return what a reader should think of figures that exact steps changed."""
    if report.saved_in_full_precision:
        return " Exact steps: nothing should change."
    sentence = f" Exact steps: what changes is rounding of the {report.saved_as} files"
    results = (outcome.steps.get((variant, step)) for step in added)
    proofs = [each.report.certificate for each in results if each and each.report.certificate]
    if not proofs:
        return f"{sentence}."
    kl = max(proof.kl_float32 for proof in proofs)
    return f"{sentence}; in float32 the KL between before and after is {kl:.1e} nats."


def _effect(metric: str, change: Interval) -> str:
    negligible = abs(change.value) < SHOWN_AS_ZERO
    noise = "" if change.beyond_noise() or negligible else " (within noise)"
    return f"{metric_named(metric).title} {with_interval(change, metric, '+')}{noise}"


def language_summary(
    kl_by_language: Mapping[str, Mapping[str, ShownFigure]], baseline: str
) -> list[str]:
    """Return in words where the KL falls most and least, for each variant that changes it."""
    lines = []
    reference = kl_by_language.get(baseline, {})
    for variant, row in kl_by_language.items():
        changes = {
            language: -(reference[language].value - figure.value)
            for language, figure in row.items()
            if language in reference
        }
        changes = {language: x for language, x in changes.items() if math.isfinite(x)}
        if variant == baseline or len(changes) < 2:
            continue
        if max(abs(change) for change in changes.values()) < MIN_LANGUAGE_GAIN:
            continue
        by_change = sorted(changes, key=lambda language: changes[language])
        most, least = by_change[0], by_change[-1]
        lines.append(
            f"`{variant}`: the KL falls most in {most} ({changes[most]:+.3f}) "
            f"and least in {least} ({changes[least]:+.3f})."
        )
    return lines
