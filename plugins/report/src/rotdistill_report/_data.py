"""What a report tells, in one place: every figure is computed and written out here once, and Markdown, JSON and HTML show it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import TYPE_CHECKING, Any

from rotdistill_core.evaluation.intervals import (
    Estimate,
    Interval,
    estimates,
    paired_change,
    values_by_text,
)
from rotdistill_core.evaluation.metrics import COLUMNS, column
from rotdistill_core.store.records import MapsRef
from rotdistill_report._card import made_of

if TYPE_CHECKING:
    from rotdistill_core.evaluation.rows import MetricRow
    from rotdistill_core.execution.outcome import RunResult
    from rotdistill_core.recipe.resolved import ResolvedRecipe
    from rotdistill_core.store.output import StepOutput
    from rotdistill_core.store.results import Answer


FEWEST = 4
"""Texts of a language below which an interval over them says nothing."""


def span(interval: Interval, metric: str, sign: str = "") -> str:
    """Return a figure with its interval, `0.590 [0.520, 0.661]`."""
    form = f"{{:{sign}{column(metric).short}}}"
    ends = () if math.isnan(interval.low) else (interval.low, interval.high)
    value, *around = (_unsigned_zero(form.format(x)) for x in (interval.value, *ends))
    return f"{value} [{', '.join(around)}]" if around else value


def _unsigned_zero(number: str) -> str:
    return number if number.strip("+-0.") else number.lstrip("+-")


@dataclass(frozen=True)
class Figure:
    """A figure of a variant over all texts."""

    value: float
    shown: str
    own: str = ""
    """With its interval, where it has one."""
    change: str = ""
    """Its change against `base`, with interval."""
    best: bool = False


@dataclass(frozen=True)
class Fault:
    """Something that went wrong, or was refused."""

    kind: str
    where: str
    what: str


@dataclass(frozen=True)
class ReportData:
    """What the report says."""

    name: str
    run: str
    base: str
    """The variant that others are compared with."""
    table: dict[str, dict[str, Figure]]
    """Variant -> metric -> figure."""
    failed: dict[str, list[str]]
    """Variant -> the checks that it breaks."""
    estimates: dict[str, dict[str, Estimate]]
    """Metric -> variant -> intervals."""
    languages: dict[str, dict[str, Figure]]
    """Variant -> language -> held-out KL."""
    layers: dict[str, dict[str, dict[int, float]]]
    """Metric -> variant -> layer boundary -> figure."""
    diagnostics: dict[str, dict[int, dict[str, Any]]]
    """Alignment step -> layer boundary -> its diagnostics."""
    steps: list[dict[str, Any]]
    answers: dict[str, dict[str, Answer]]
    """Variant -> question id -> the answers of teacher and variant."""
    shown: list[str]
    """The variants whose answers are shown: `base`, and `full` or the last."""
    made: dict[str, dict[str, str]]
    """What was done to what: models, texts, versions."""
    recipe: str
    verdict: str = ""
    """In one sentence: whether it worked."""
    mood: str = "none"
    """good, bad or none: how the sentence is coloured."""
    faults: list[Fault] = field(default_factory=list)
    bought: list[str] = field(default_factory=list)
    by_language: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    """One line for each of length, language, chrF, facts: whether answers went towards the teacher's."""

    @property
    def metrics(self) -> list[str]:
        """The metrics of the table, known ones first."""
        there = dict.fromkeys(
            m
            for figures in self.table.values()
            for m in figures
            if m != "failed" and not m.endswith("_teacher")
        )
        there |= dict.fromkeys(
            m for figures in self.table.values() for m in figures if m == "answer_language_teacher"
        )
        return [m for m in COLUMNS if m in there] + [m for m in there if m not in COLUMNS]

    def json(self) -> dict[str, Any]:
        """Return everything as JSON values; what is not finite is text."""
        return {field: _plain(value) for field, value in vars(self).items()}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def collect(loaded: ResolvedRecipe, outcome: RunResult, out: StepOutput) -> ReportData:
    """Return what there is to tell of a run; what it means comes from `rotdistill_verdict`."""
    from rotdistill_core.evaluation.rows import overall_figures

    variants = list(loaded.recipe.variants)
    base = "base" if "base" in variants else variants[0]
    rows = [
        row._replace(value=float(row.value)) for row in outcome.rows
    ]  # read back from results.jsonl some may be text
    found = estimates(rows, base, loaded.recipe.seed)
    answers = {
        variant: done.report.answers
        for (variant, _), done in outcome.steps.items()
        if done.report.answers
    }
    failed = {
        row.variant: ["it broke a check when it was made."]
        for row in rows
        if row.metric == "failed"
    } | outcome.failed
    there = [variant for variant in variants if variant in answers]
    ends = (
        [base if base in there else there[0], "full" if "full" in there else there[-1]]
        if there
        else []
    )
    by_layer = [row for row in rows if row.layer is not None and row.text is None]
    return ReportData(
        loaded.recipe.name, outcome.folder.name, base, table(overall_figures(rows), found, base), failed, found,
        languages(rows, base, loaded.recipe.seed), _curves(by_layer), _cards(outcome, out), _steps(outcome), answers,
        list(dict.fromkeys(ends)), made_of(loaded, outcome), loaded.text,
    )  # fmt: skip


def table(
    values: Mapping[str, Mapping[str, float]],
    found: Mapping[str, Mapping[str, Estimate]],
    base: str,
) -> dict[str, dict[str, Figure]]:
    """Return the table of variants. A figure that is not finite is shown, and never the best; figures that look alike are equally good."""
    best: dict[str, str] = {}
    for metric in {m for row in values.values() for m in row}:
        there = [
            row[metric] for row in values.values() if metric in row and math.isfinite(row[metric])
        ]
        way, form = column(metric).better, column(metric).form
        if way and len({f"{value:{form}}" for value in there}) > 1:
            best[metric] = f"{max(there) if way > 0 else min(there):{form}}"
    made: dict[str, dict[str, Figure]] = {}
    for variant, row in values.items():
        made[variant] = {}
        for metric, value in row.items():
            shown, known = f"{value:{column(metric).form}}", found.get(metric, {}).get(variant)
            own, change = (
                (span(known.own, metric), span(known.change, metric, "+") if known.change else "")
                if known
                else ("", "")
            )
            if (
                not change
                and variant != base
                and column(metric).better
                and metric in values.get(base, {})
            ):
                change = _unsigned_zero(f"{value - values[base][metric]:+{column(metric).form}}")
            made[variant][metric] = Figure(value, shown, own, change, best.get(metric) == shown)
    return made


def languages(rows: list[MetricRow], base: str, seed: int) -> dict[str, dict[str, Figure]]:
    """Return variant -> language -> held-out KL, with its change on the texts of that language."""
    texts = {row.text: row.language for row in rows if row.metric == "kl" and row.text}
    seen = values_by_text(row for row in rows if row.metric == "kl").get("kl", {})
    made: dict[str, dict[str, Figure]] = {}
    for row in rows:
        if row.metric == "kl" and row.language and row.text is None:
            mine, first = (
                {t: v for t, v in seen.get(who, {}).items() if texts[t] == row.language}
                for who in (row.variant, base)
            )
            change = paired_change(mine, first, seed) if row.variant != base else None
            if change and len(mine) < FEWEST:
                change = Interval(change.value, math.nan, math.nan)
            made.setdefault(row.variant, {})[row.language] = Figure(
                row.value, f"{row.value:.3f}", "", span(change, "kl", "+") if change else ""
            )
    return made


def _curves(rows: list[MetricRow]) -> dict[str, dict[str, dict[int, float]]]:
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        found.setdefault(row.metric, {}).setdefault(row.variant, {})[row.layer or 0] = row.value
    return found


def _cards(outcome: RunResult, out: StepOutput) -> dict[str, dict[int, dict[str, Any]]]:
    """Return what aligners stored about each layer: each solved step once, without what an earlier one had stored already."""
    cards = {
        record.key: record.result.cards
        for record in out.ledger.steps
        if isinstance(record.result, MapsRef)
    }
    found: dict[str, dict[int, dict[str, Any]]] = {}
    told: dict[str, set[tuple[int, str, str]]] = {}
    seen: set[str] = set()
    for (variant, step), done in outcome.steps.items():
        paths = cards.get(done.key, {})
        before = told.setdefault(variant, set())
        diagnostics = {
            int(layer): json.loads((out.store.root / path).read_text(encoding="utf-8"))
            for layer, path in paths.items()
        }
        new = {
            i: {k: v for k, v in diagnostics[i].items() if (i, k, str(v)) not in before}
            for i in sorted(diagnostics)
        }
        before |= {(i, k, str(v)) for i, card in diagnostics.items() for k, v in card.items()}
        if paths and done.key not in seen:
            seen.add(done.key)
            found[step if step not in found else f"{step} ({variant})"] = new
    return found


def _steps(outcome: RunResult) -> list[dict[str, Any]]:
    """Return the steps that ran, each once, with what they noted; answers are told elsewhere."""
    first: dict[str, dict[str, Any]] = {}
    for (variant, step), done in outcome.steps.items():
        notes = dict(done.notes)
        if done.report.certificate:
            notes["certificate"] = asdict(done.report.certificate)
        if done.report.refused:
            notes["refused"] = done.report.refused
        first.setdefault(
            done.key,
            {
                "step": step,
                "variant": variant,
                "reused": done.reused,
                "seconds": done.seconds,
                "notes": notes,
                "report": done.report,
            },
        )
    return list(first.values())
