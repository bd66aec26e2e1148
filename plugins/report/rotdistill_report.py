"""The report of a run, report.md: the table of variants, how sure it is, languages, what each step did, and answers side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader
from rotdistill_intervals import DRAWS, Estimate, Interval, estimates

from rotdistill_core import hookimpl

if TYPE_CHECKING:
    from rotdistill_core.api import Loaded, Out, Outcome

FIGURES = {
    "kl": ("held-out KL", ".3f"), "top1": ("top-1", ".3f"), "guard_kl": ("guard KL", ".3f"),
    "answer_chrf": ("chrF", ".1f"), "answer_length": ("length", ".2f"), "answer_length_gap": ("length gap", ".2f"),
    "answer_language": ("in the question's language", ".2f"), "answer_language_teacher": ("in the teacher's language", ".2f"),
}  # fmt: skip
"""Metric -> title and number format; a metric that is not here goes by its own name."""


@dataclass(frozen=True)
class Told:
    """What the report says beside the plain figures."""

    base: str
    """The variant that others are compared with."""
    estimates: dict[str, dict[str, Estimate]]
    answers: dict[str, dict[str, dict[str, str]]]
    """Variant -> question -> language, question, teacher, said."""
    shown: list[str]
    """The variants whose answers are shown: `base`, and `full` or the last."""

    def own(self, metric: str, variant: str) -> str:
        """Return a variant's figure with its interval; nothing where it has none."""
        found = self.estimates[metric].get(variant)
        return span(found.own, metric) if found else ""

    def change(self, metric: str, variant: str) -> str:
        """Return the change of a variant's figure with its interval; nothing where it has none."""
        found = self.estimates[metric].get(variant)
        return span(found.change, metric, "+") if found and found.change else ""

    @property
    def words(self) -> list[str]:
        """One line for each of length, language and chrF, where two variants have answered."""
        return compare(self.estimates, *self.shown) if len(self.shown) == 2 else []


@hookimpl
def run_ended(loaded: Loaded, outcome: Outcome, out: Out) -> object:
    """See `Specs.run_ended`."""
    told = tell(loaded, outcome)
    out.write("report.md", [markdown(loaded, outcome, told).encode()])
    return terminal(told)


def tell(loaded: Loaded, outcome: Outcome) -> Told:
    """Return intervals and answers of a run."""
    variants = list(loaded.recipe.variants)
    base = "base" if "base" in variants else variants[0]
    answers = {variant: done.notes["answers"] for (variant, _), done in outcome.steps.items() if "answers" in done.notes}
    there = [variant for variant in variants if variant in answers]
    ends = [base if base in there else there[0], "full" if "full" in there else there[-1]] if there else []
    return Told(base, estimates(outcome.rows, base, loaded.recipe.seed), answers, list(dict.fromkeys(ends)))


def compare(found: Mapping[str, Mapping[str, Estimate]], one: str, two: str) -> list[str]:
    """Return in words whether answers move towards the teacher's from variant `one`, which changes are against, to `two`."""

    def went(metric: str, form: str) -> str:
        return " → ".join(form.format(found[metric][variant].own.value) for variant in (one, two))

    def verdict(metric: str, better: int) -> str:
        change = found[metric][two].change
        if change is None:
            return "not compared."
        way = "towards the teacher" if change.value * better > 0 else "away from the teacher"
        return f"{way if change.beyond_noise() else 'no change beyond noise'} ({span(change, metric, '+')})."

    lengths = f"{went('answer_length', '{:.2f}')} times the teacher's, mean |ln| of that {went('answer_length_gap', '{:.2f}')}"
    asked = f"{went('answer_language', '{:.0%}')} in the question's language, " if "answer_language" in found else ""
    lines = [f"Length: {lengths}: {verdict('answer_length_gap', -1)}"]
    if "answer_language_teacher" in found:  # not where no answer of the teacher is in a language that can be told
        languages = f"{asked}{went('answer_language_teacher', '{:.0%}')} in that of the teacher's answer"
        lines.append(f"Language: {languages}: {verdict('answer_language_teacher', 1)}")
    return [*lines, f"chrF against the teacher's answers: {went('answer_chrf', '{:.1f}')}: {verdict('answer_chrf', 1)}"]


def span(interval: Interval, metric: str, sign: str = "") -> str:
    """Return a figure with its interval, `0.590 [0.520, 0.661]`."""
    form = f"{{:{sign}{FIGURES.get(metric, ('', '.3f'))[1]}}}"
    ends = () if math.isnan(interval.low) else (interval.low, interval.high)
    value, *around = (_unsigned_zero(form.format(x)) for x in (interval.value, *ends))
    return f"{value} [{', '.join(around)}]" if around else value


def _unsigned_zero(number: str) -> str:
    return number if number.strip("+-0.") else number.lstrip("+-")


def terminal(told: Told) -> object:
    """Return what the terminal shows: intervals, answers in words, and one question answered; None where there is nothing of it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Table | Text] = []
    known = [metric for metric in told.estimates if not metric.startswith("answer_")]
    if known:
        titles = [f"{FIGURES.get(metric, (metric, ''))[0]}, change" for metric in known]
        table = Table("variant", FIGURES.get(known[0], (known[0], ""))[0], *titles)
        table.title = f"95 % intervals over texts; changes are against {told.base}"
        for variant in told.estimates[known[0]]:
            table.add_row(variant, told.own(known[0], variant), *(told.change(metric, variant) for metric in known))
        parts.append(table)
    if told.shown:
        parts += [Text(f"\nAnswers, {' → '.join(told.shown)}")] if told.words else []
        parts += [Text(f"  {line}") for line in told.words]
        question, first_answer = next(iter(told.answers[told.shown[0]].items()))
        said = {"teacher": first_answer["teacher"]} | {variant: told.answers[variant][question]["said"] for variant in told.shown}
        parts += [Text.assemble("\n", (who, "bold"), f" answers {question}: {' '.join(text.split())}") for who, text in said.items()]
    return Group(*parts) if parts else None


def markdown(loaded: Loaded, outcome: Outcome, told: Told) -> str:
    """Return report.md."""
    from rotdistill_core.report import COLUMNS, figures

    by = {(r.variant, r.language): r.value for r in outcome.rows if r.metric == "kl" and r.language and r.text is None}
    first: dict[str, tuple[str, str, Any]] = {}
    for (variant, step), done in outcome.steps.items():
        first.setdefault(done.key, (variant, step, done))
    made = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True)  # noqa: S701  Markdown, not HTML
    made.filters |= {"short": _short, "cell": _cell}
    groups = [[m for m in told.estimates if m.startswith("answer_") == answers] for answers in (False, True)]
    return made.get_template("rotdistill_report.md.j2").render(
        recipe=loaded.recipe, columns=COLUMNS, values=figures(outcome.rows), by=by, told=told, draws=DRAWS, scores=groups[0],
        answered=groups[1], titles={m: FIGURES.get(m, (m, ""))[0] for m in told.estimates},
        languages=sorted({language for _, language in by}), steps=first.values(),
    )  # fmt: skip


def _cell(text: str) -> str:
    """Return text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "; ".join(f"{k}: {_short(v)}" for k, v in value.items())
    return ", ".join(map(_short, value)) if isinstance(value, list) else str(value)
