"""The summary of a report on the terminal."""

from __future__ import annotations

from rich.console import Group
from rich.text import Text

from rotdistill_core.evaluation.metrics import metric_named
from rotdistill_core.terminal import WideTable, program_name
from rotdistill_report._data import ReportData, Tone

STYLES = {Tone.GOOD: "bold green", Tone.BAD: "bold red", Tone.NEUTRAL: "bold"}
INTERVAL_METRICS = ("kl", "top1", "guard_kl")
"""The metrics whose changes the terminal shows with intervals."""


def terminal_summary(report: ReportData) -> Group:
    """Return the verdict, intervals, what became of the answers, one question answered, and what to
    do next."""
    parts: list[WideTable | Text] = [
        Text(report.verdict.replace("`", ""), style=STYLES[report.tone])
    ]
    if report.answer_verdict:
        judged = Text(report.answer_verdict.replace("`", ""), style=STYLES[report.answer_tone])
        parts.append(judged)
    metrics = [metric for metric in INTERVAL_METRICS if metric in report.estimates]
    if metrics:
        parts.append(_interval_table(report, metrics))
    if report.answer_variants:
        parts += _answers(report)
    if report.next_step:
        words = f"\nNext, {report.next_step.what}:\n  "
        command = report.next_step.command
        if command.startswith("rotdistill "):
            command = program_name() + command.removeprefix("rotdistill")
        parts.append(Text.assemble(words, (command, "bold")))
        if command.split()[1:2] == ["run"]:
            parts.append(Text("  (plan in place of run says what that takes)"))
    return Group(*parts)


def _interval_table(report: ReportData, metrics: list[str]) -> WideTable:
    """Return the first metric with its interval, then the change of every metric."""
    first = metrics[0]
    headers = [f"{metric_named(metric).title},\nchange" for metric in metrics]
    table = WideTable("variant", metric_named(first).title, *headers)
    table.title = f"95 % intervals over texts; changes are against {report.baseline}"
    for variant in report.estimates[first]:
        row = report.figures[variant]
        changes = [row[metric].change if metric in row else "" for metric in metrics]
        table.add_row(variant, row[first].interval, *changes)
    return table


def _answers(report: ReportData) -> list[Text]:
    lines = []
    if report.answer_summary:
        lines.append(Text(f"\nAnswers, {' → '.join(report.answer_variants)}"))
        lines += [Text(f"  {line}") for line in report.answer_summary]
    question = report.first_questions[0]
    texts = {"teacher": report.answers[report.answer_variants[0]][question].teacher}
    for variant in report.answer_variants:
        texts[variant] = report.answers[variant][question].student
    for name, text in texts.items():
        one_line = " ".join(text.split())
        lines.append(Text.assemble("\n", (name, "bold"), f" answers {question}: {one_line}"))
    return lines
