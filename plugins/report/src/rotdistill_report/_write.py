"""Writing the report of a run: three files with the same figures, and a card per checkpoint."""

from __future__ import annotations

from rich.console import Group

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.evaluation.intervals import DRAWS
from rotdistill_core.evaluation.metrics import is_answer_metric, is_teacher_metric
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.planning.chats import DATE
from rotdistill_core.recipe.resolved import ResolvedRecipe
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.output import StepOutput
from rotdistill_report._card import model_card
from rotdistill_report._data import ReportData, collect
from rotdistill_report._findings import with_findings
from rotdistill_report._plots import plots
from rotdistill_report._templates import template
from rotdistill_report._terminal import terminal_summary


def write_report(recipe: ResolvedRecipe, outcome: RunResult, out: StepOutput) -> Group:
    """Write report.md, report.json, report.html and model cards; return the terminal's summary.

    Cards name the models' licences and hashes, so there are none where the models were not opened.
    """
    report = with_findings(collect(recipe, outcome, out), recipe, outcome)
    out.write(RunLayout.REPORT_MARKDOWN, [markdown(report).encode()])
    out.json(RunLayout.REPORT_JSON, report.as_json())
    out.write(RunLayout.REPORT_HTML, [html(report, out).encode()])
    if outcome.pair:
        _write_cards(report, recipe, outcome, outcome.pair, out)
    return terminal_summary(report)


def markdown(report: ReportData) -> str:
    """Return report.md."""
    measured = [
        metric
        for metric in report.estimates
        if not is_answer_metric(metric) and not is_teacher_metric(metric)
    ]
    return template("report.md.j2").render(report=report, draws=DRAWS, interval_metrics=measured)


def html(report: ReportData, out: StepOutput) -> str:
    """Return report.html: one file without script, which loads nothing."""
    return template("report.html.j2").render(report=report, draws=DRAWS, plots=plots(report, out))


def _write_cards(
    report: ReportData, recipe: ResolvedRecipe, outcome: RunResult, pair: Pair, out: StepOutput
) -> None:
    """Write the model card of each checkpoint whose card is missing or changes."""
    date = next((start.inputs.get(DATE, "") for start in out.ledger.starts[::-1]), "")
    for variant, folder in outcome.checkpoints.items():
        card = model_card(report, recipe, outcome, pair, variant, date).encode()
        name = f"{folder.relative_to(outcome.folder).as_posix()}/{RunLayout.CARD}"
        out.document(name, [card])
