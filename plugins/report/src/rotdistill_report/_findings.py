"""What the figures of a run mean: whether it worked, what is not to be trusted, what went wrong, what each step bought."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rotdistill_core.evaluation.intervals import Estimate, Interval, paired_change, values_by_text
from rotdistill_core.evaluation.metrics import COLUMNS, column
from rotdistill_report._data import Fault, Figure, ReportData, span

if TYPE_CHECKING:
    from rotdistill_core.execution.outcome import RunResult
    from rotdistill_core.recipe.resolved import ResolvedRecipe


TINY = 1e-6
"""A ridge below this share of the mean diagonal is none: the fit follows every rounding of its rows."""
SMALL = 0.01
"""Share of a figure of `base` below which a change is not worth a line of its own."""
EXACT = 1e-3
"""Nats by which a variant of exact steps may differ in its KL: float32 rounding is well below."""
BOUGHT = ("kl", "guard_kl", "top1", "answer_chrf", "factual_completeness", "hallucination_rate")
"""What is said of each variant's own steps; metrics of other evaluators follow."""
CONTROLS = {
    "shuffled": "the teacher's rows were shuffled on purpose: what is fitted to them has nothing to learn",
    "self": "the student was its own teacher on purpose: there is nothing to learn",
    "reversed": "the layer map was turned round on purpose: every layer stands beside a wrong one of the teacher",
}


def with_findings(told: ReportData, loaded: ResolvedRecipe, outcome: RunResult) -> ReportData:
    """Return the report with everything that is said in words."""
    alarms = list(validity_warnings(told, loaded))
    faults = [*alarms, *collect_issues(told, loaded, outcome)]
    sentence, mood = verdict(told, loaded, alarms)
    return replace(
        told, verdict=sentence, mood=mood, faults=faults, bought=list(ablation_effects(told, loaded, outcome)),
        by_language=by_language(told.languages, told.base), words=words(told),
    )  # fmt: skip


def validity_warnings(told: ReportData, loaded: ResolvedRecipe) -> Iterator[Fault]:
    """Yield why the run is not to be trusted: a control in place of the real thing, a ridge that is none, maps no better than chance."""
    real = {
        name
        for name in loaded.recipe.variants
        if any(p.stage in ("align", "fold", "style") for p in loaded.chain(name))
    } - {told.base}
    for recipe_step in loaded.steps:
        control, ridge = (
            getattr(recipe_step.step, "control", "none"),
            getattr(recipe_step.step, "ridge", None),
        )
        users = {name for name in loaded.recipe.variants if recipe_step in loaded.chain(name)}
        if (
            control in CONTROLS and real <= users
        ):  # beside the real thing a control is what it should be
            yield Fault("control", recipe_step.id, f"{CONTROLS[control]}.")
        if (
            recipe_step.stage in ("fold", "style")
            and isinstance(ridge, tuple)
            and users
            and max(ridge) < TINY
        ):
            yield Fault(
                "no ridge",
                recipe_step.id,
                f"λ is at most {max(ridge):g} of the mean diagonal: the fit follows the noise of its rows.",
            )
    deliberate = {
        recipe_step.id for recipe_step in loaded.steps if recipe_step.step.use == "random-rotation"
    }
    for step, diagnostics in told.diagnostics.items():
        pairs = [
            (c["cosine_after"], c["cosine_shuffled"])
            for c in diagnostics.values()
            if {"cosine_after", "cosine_shuffled"} <= c.keys()
        ]
        blind = sum(not after > shuffled for after, shuffled in pairs)
        if pairs and 2 * blind >= len(pairs) and step.partition(" ")[0] not in deliberate:
            yield Fault(
                "chance",
                step,
                f"at {blind} of {len(pairs)} boundaries its map is no better than one fitted to shuffled rows.",
            )


def collect_issues(told: ReportData, loaded: ResolvedRecipe, outcome: RunResult) -> Iterator[Fault]:
    """Yield what failed, was refused or got worse, the gravest first."""
    for variant, faults in told.failed.items():
        yield from (Fault("failed", variant, fault) for fault in faults)
    for step in told.steps:
        if step["report"].refused:
            yield Fault(
                "refused", f"{step['step']} (in {step['variant']})", f"{step['report'].refused}."
            )
    saved = loaded.recipe.student.save_dtype
    wide = saved in ("float32", "float64") or (
        saved == "auto" and outcome.pair and outcome.pair.student.weights.dtype.itemsize >= 4
    )
    for variant in told.table:
        kl = [
            told.table[v]["kl"].value for v in (variant, told.base) if "kl" in told.table.get(v, {})
        ]
        if (
            wide
            and len(kl) == 2
            and not added(loaded, variant, told.base)[1]
            and not abs(kl[0] - kl[1]) <= EXACT
        ):
            yield Fault(
                "not exact",
                variant,
                f"it has exact steps only, and its KL is {kl[0] - kl[1]:+.4f} off: that is an error of the program.",
            )
    for name, diagnostics in told.diagnostics.items():
        yield from (Fault("hurt", name, what) for what in worse_alignments(diagnostics))
    for variant, row in told.table.items():
        for metric in row:
            change = (
                told.estimates.get(metric, {})
                .get(variant, Estimate(Interval(0, 0, 0), None))
                .change
            )
            scale = (
                told.table[told.base][metric].value
                if metric in told.table.get(told.base, {})
                else 0.0
            )
            beyond = change and change.beyond_noise() and abs(change.value) > SMALL * abs(scale)
            if change and beyond and change.value * column(metric).better < 0:
                yield Fault(
                    "worse",
                    variant,
                    f"{column(metric).title} went {span(change, metric, '+')} against {told.base}.",
                )


def worse_alignments(diagnostics: Mapping[int, Mapping[str, Any]]) -> Iterator[str]:
    """Say where a map leaves a layer farther from the teacher than it was."""
    for part in ("heads", "neurons"):
        there = {
            i: card[part]
            for i, card in diagnostics.items()
            if isinstance(card.get(part), dict) and "identity_score" in card[part]
        }
        worse = {
            i: (c["identity_score"], c["score"])
            for i, c in there.items()
            if c["score"] < c["identity_score"] - 1e-6
        }
        if worse:
            yield f"the permutation of {part} matches worse than none at all {_places(worse, len(there))}."
    both = {
        i: (c["cosine_before"], c["cosine_after"])
        for i, c in diagnostics.items()
        if None not in (c.get("cosine_before"), c.get("cosine_after"))
    }
    worse = {i: pair for i, pair in both.items() if pair[1] < pair[0] - 1e-3}
    if worse:
        yield (f"the rotation lowers the cosine to the teacher {_places(worse, len(both))}. That is to be expected where the student "
               "has the teacher's own layers; an exact fold of it changes no logit.")  # fmt: skip


def _places(worse: Mapping[int, tuple[float, float]], of: int) -> str:
    most = max(worse, key=lambda i: worse[i][0] - worse[i][1])
    return f"at {len(worse)} of {of} layers, most at {most}: from {worse[most][0]:.3f} to {worse[most][1]:.3f}"


def added(loaded: ResolvedRecipe, variant: str, than: str) -> tuple[list[str], list[str]]:
    """Return the steps that a variant has and another has not, and which steps of either are no exact ones."""
    chains = [
        [p for p in loaded.chain(v) if p.stage != "evaluate"] if v in loaded.recipe.variants else []
        for v in (variant, than)
    ]
    if variant not in loaded.recipe.variants:
        return [], [variant]
    apart = [p for p in (*chains[0], *chains[1]) if (p in chains[0]) is not (p in chains[1])]
    moved = [
        p.id
        for p in apart
        if p.stage == "style"
        or (p.stage in ("fold", "capture") and not getattr(p.step, "exact", False))
    ]
    return [p.id for p in chains[0] if p not in chains[1]], moved


def verdict(told: ReportData, loaded: ResolvedRecipe, alarms: list[Fault]) -> tuple[str, str]:
    """Return in one sentence whether the run worked, and its colour."""
    if alarms:
        return f"Not to be trusted: `{alarms[0].where}`: {alarms[0].what}", "bad"
    if told.failed:
        variant, faults = next(iter(told.failed.items()))
        more = f" {len(told.failed)} variants failed." if len(told.failed) > 1 else ""
        return f"Failed: `{variant}` breaks a check: {faults[0]}{more}", "bad"
    changes = {
        v: e.change
        for v, e in told.estimates.get("kl", {}).items()
        if e.change and v in loaded.recipe.variants
    }
    if not changes:
        return "Nothing to compare: the run has no second variant with a KL to the teacher.", "none"
    best = min(changes, key=lambda variant: changes[variant].value)
    than = told.base if told.base in told.estimates["kl"] else next(iter(told.estimates["kl"]))
    own, first = told.table[best], told.table[than]
    if all(abs(change.value) <= EXACT for change in changes.values()) and not any(
        added(loaded, v, than)[1] for v in changes
    ):
        return f"Exact steps only: every variant scores as `{than}`, as it must.", "good"
    if not (changes[best].beyond_noise() and changes[best].value < 0):
        return (
            f"It did not work: no variant is nearer to the teacher than `{than}` beyond what the choice of texts explains.",
            "bad",
        )
    cost = ""
    if "guard_kl" in own and "guard_kl" in first:
        cost = f" Outside the domain the KL went from {first['guard_kl'].shown} to {own['guard_kl'].shown}."
    went = f"{own['kl'].shown} nats per token instead of {first['kl'].shown} ({span(changes[best], 'kl', '+')})"
    return (
        f"It worked: `{best}` is nearest to the teacher, with a held-out KL of {went}.{cost}",
        "good",
    )


def ablation_effects(told: ReportData, loaded: ResolvedRecipe, outcome: RunResult) -> Iterator[str]:
    """Yield in words what each variant's own steps changed, against the largest variant that is part of it."""
    texts = values_by_text(outcome.rows)
    steps = {
        name: {p.id for p in loaded.chain(name) if p.stage != "evaluate"}
        for name in loaded.recipe.variants
    }
    for variant in steps:
        smaller = [
            other for other in steps if other in told.table and steps[other] < steps[variant]
        ]
        if variant not in told.table or not smaller:
            continue
        parent = max(smaller, key=lambda other: len(steps[other]))
        new, moved = added(loaded, variant, parent)
        parts = []
        for metric in (
            *BOUGHT,
            *(
                metric
                for metric in texts
                if metric not in COLUMNS and not metric.endswith("_teacher")
            ),
        ):
            both = [texts.get(metric, {}).get(v) for v in (variant, parent)]
            change = (
                paired_change(both[0], both[1], loaded.recipe.seed) if both[0] and both[1] else None
            )
            if change:
                noise = (
                    "" if change.beyond_noise() or abs(change.value) < 5e-4 else " (within noise)"
                )
                parts.append(f"{column(metric).title} {span(change, metric, '+')}{noise}")
        exact = "" if moved else " Exact steps: nothing is to change."
        yield f"`{variant}` = `{parent}` + {', '.join(new)}: {'; '.join(parts) or 'nothing was measured on both'}.{exact}"


def by_language(languages: Mapping[str, Mapping[str, Figure]], base: str) -> list[str]:
    """Return in words where the gain is largest, for each variant that changes anything."""
    lines = []
    for variant, row in languages.items():
        gains = {
            k: languages[base][k].value - figure.value
            for k, figure in row.items()
            if k in languages.get(base, {})
        }
        gains = {k: gain for k, gain in gains.items() if math.isfinite(gain)}
        if variant == base or len(gains) < 2 or max(map(abs, gains.values())) < 10 * EXACT:
            continue
        order = sorted(gains, key=lambda k: -gains[k])
        lines.append(
            f"`{variant}`: the KL falls most in {order[0]} ({-gains[order[0]]:+.3f}) and least in {order[-1]} ({-gains[order[-1]]:+.3f})."
        )
    return lines


def words(told: ReportData) -> list[str]:
    """Return one line for each of length, language, chrF and facts, where two variants have answered."""
    return compare(told.estimates, *told.shown) if len(told.shown) == 2 else []


def compare(found: Mapping[str, Mapping[str, Estimate]], one: str, two: str) -> list[str]:
    """Return in words whether answers move towards the teacher's from variant `one`, which changes are against, to `two`."""

    def went(metric: str, form: str) -> str:
        return " → ".join(form.format(found[metric][variant].own.value) for variant in (one, two))

    def moved(
        metric: str,
        better: int,
        ways: tuple[str, str] = ("towards the teacher", "away from the teacher"),
    ) -> str:
        change = found[metric][two].change
        if change is None:
            return "not compared."
        way = ways[0] if change.value * better > 0 else ways[1]
        return f"{way if change.beyond_noise() else 'no change beyond noise'} ({span(change, metric, '+')})."

    lengths = f"{went('answer_length', '{:.2f}')} times the teacher's, mean |ln| of that {went('answer_length_gap', '{:.2f}')}"
    asked = (
        f"{went('answer_language', '{:.0%}')} in the question's language, "
        if "answer_language" in found
        else ""
    )
    lines = [f"Length: {lengths}: {moved('answer_length_gap', -1)}"]
    if (
        "answer_language_teacher" in found
    ):  # not where no answer of the teacher is in a language that can be told
        languages = (
            f"{asked}{went('answer_language_teacher', '{:.0%}')} in that of the teacher's answer"
        )
        lines.append(f"Language: {languages}: {moved('answer_language_teacher', 1)}")
    lines.append(
        f"chrF against the teacher's answers: {went('answer_chrf', '{:.1f}')}: {moved('answer_chrf', 1)}"
    )
    for metric, what, better in (
        ("factual_completeness", "Expected facts named", 1),
        ("hallucination_rate", "Answers with a known error", -1),
    ):
        if metric in found:
            its = f"{metric}_teacher"
            goal = f" (the teacher {found[its][one].own.value:.0%})" if its in found else ""
            lines.append(
                f"{what}: {went(metric, '{:.0%}')}{goal}: {moved(metric, better, ('better', 'worse'))}"
            )
    return lines
