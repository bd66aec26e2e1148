"""The report of a run, report.md: the table of variants, languages, what each step did, and answers side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader

from rotdistill_core import hookimpl

if TYPE_CHECKING:
    from rotdistill_core.api import Loaded, Out, Outcome


@hookimpl
def run_ended(loaded: Loaded, outcome: Outcome, out: Out) -> None:
    """See `Specs.run_ended`."""
    out.write("report.md", [markdown(loaded, outcome).encode()])


def markdown(loaded: Loaded, outcome: Outcome) -> str:
    """Return report.md."""
    from rotdistill_core.report import COLUMNS, figures

    by = {(r.variant, r.language): r.value for r in outcome.rows if r.metric == "kl" and r.language and r.text is None}
    first: dict[str, tuple[str, str, Any]] = {}
    for (variant, step), done in outcome.steps.items():
        first.setdefault(done.key, (variant, step, done))
    made = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True)  # noqa: S701  Markdown, not HTML
    made.filters["short"] = _short
    return made.get_template("rotdistill_report.md.j2").render(
        recipe=loaded.recipe, columns=COLUMNS, values=figures(outcome.rows), by=by, answers=outcome.answers,
        languages=sorted({language for _, language in by}), steps=first.values(),
    )  # fmt: skip


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "; ".join(f"{k}: {_short(v)}" for k, v in value.items())
    return ", ".join(map(_short, value)) if isinstance(value, list) else str(value)
