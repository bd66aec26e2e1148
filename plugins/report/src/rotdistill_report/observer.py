"""The report of a run: report.md, report.json and report.html say the same, from one place; and each checkpoint gets its card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from rotdistill_core import hookimpl
from rotdistill_core.evaluation.intervals import DRAWS
from rotdistill_core.evaluation.metrics import column
from rotdistill_report._card import card_of
from rotdistill_report._data import ReportData, collect
from rotdistill_report._findings import with_findings

if TYPE_CHECKING:
    from rotdistill_core.execution.outcome import RunResult
    from rotdistill_core.recipe.resolved import ResolvedRecipe
    from rotdistill_core.store.output import StepOutput


@hookimpl
def run_ended(loaded: ResolvedRecipe, outcome: RunResult, out: StepOutput) -> object:
    """See `Specs.run_ended`."""
    told = with_findings(collect(loaded, outcome, out), loaded, outcome)
    out.write("report.md", [markdown(told).encode()])
    out.json("report.json", told.json())
    out.write("report.html", [html(told, out.store.root).encode()])
    if (
        pair := outcome.pair
    ):  # not when it is written anew from a ledger alone; the cards are there then
        for variant, folder in outcome.checkpoints.items():
            card = card_of(told, loaded, outcome, pair, variant, _template("card.md.j2")).encode()
            name = f"{folder.relative_to(outcome.folder).as_posix()}/README.md"
            there = out.find(name)
            if (
                there is None or there.read_bytes() != card
            ):  # a checkpoint in which nothing changes is not touched
                out.write(name, [card])
    return terminal(told)


def _template(name: str, **filters: Any) -> Any:
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=name.endswith("html.j2"),
    )
    page.filters |= {"short": _short, "column": column, **filters}
    return page.get_template(name)


def markdown(told: ReportData) -> str:
    """Return report.md."""
    scores = [
        [
            m
            for m in told.estimates
            if m.startswith("answer_") == answers and not m.endswith("_teacher")
        ]
        for answers in (False, True)
    ]
    return str(
        _template("report.md.j2", cell=_cell).render(
            told=told, draws=DRAWS, scores=scores[0], languages=_languages(told)
        )
    )


def html(told: ReportData, root: Path) -> str:
    """Return report.html: one file, without script and without anything from elsewhere; `root` is the folder of runs."""
    from rotdistill_report._plots import plots

    def code(text: str) -> Markup:
        parts = str(escape(text)).split("`")
        return Markup(
            "".join(f"<code>{part}</code>" if k % 2 else part for k, part in enumerate(parts))
        )  # noqa: S704  escaped above

    page = _template("report.html.j2", code=code, svg=Markup)
    return str(
        page.render(told=told, draws=DRAWS, languages=_languages(told), plots=plots(told, root))
    )


def _languages(told: ReportData) -> list[str]:
    return sorted({language for row in told.languages.values() for language in row})


def terminal(told: ReportData) -> object:
    """Return what the terminal shows: the verdict, intervals, answers in words, and one question answered."""
    from rich.console import Group
    from rich.text import Text

    from rotdistill_core.terminal import WideTable

    parts: list[WideTable | Text] = [
        Text(
            told.verdict.replace("`", ""),
            {"good": "bold green", "bad": "bold red"}.get(told.mood, "bold"),
        )
    ]
    known = [m for m in ("kl", "top1", "guard_kl") if m in told.estimates]
    if known:
        table = WideTable(
            "variant",
            column(known[0]).title,
            *(f"{column(metric).title},\nchange" for metric in known),
        )
        table.title = f"95 % intervals over texts; changes are against {told.base}"
        for variant in told.estimates[known[0]]:
            row = told.table[variant]
            table.add_row(
                variant, row[known[0]].own, *(row[m].change if m in row else "" for m in known)
            )
        parts.append(table)
    if told.shown:
        parts += [Text(f"\nAnswers, {' → '.join(told.shown)}")] if told.words else []
        parts += [Text(f"  {line}") for line in told.words]
        question, first_answer = next(iter(told.answers[told.shown[0]].items()))
        said = {"teacher": first_answer.teacher} | {
            variant: told.answers[variant][question].student for variant in told.shown
        }
        parts += [
            Text.assemble("\n", (who, "bold"), f" answers {question}: {' '.join(text.split())}")
            for who, text in said.items()
        ]
    return Group(*parts)


def _cell(text: str) -> str:
    """Return text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "; ".join(f"{k}: {_short(v)}" for k, v in value.items())
    return ", ".join(map(_short, value)) if isinstance(value, list) else str(value)
