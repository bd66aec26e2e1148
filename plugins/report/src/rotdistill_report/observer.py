"""The report of a run: report.html, report.md and report.json, and a card in each checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rotdistill_core import hookimpl

if TYPE_CHECKING:
    from rotdistill_core.execution.outcome import RunResult
    from rotdistill_core.recipe.resolved import ResolvedRecipe
    from rotdistill_core.store.output import StepOutput


@hookimpl
def run_ended(recipe: ResolvedRecipe, result: RunResult, out: StepOutput) -> object:
    """See `HookSpecs.run_ended`."""
    # Observers are loaded with the recipe; jinja2 and matplotlib only when there is a report.
    from rotdistill_report._write import write_report  # noqa: PLC0415

    return write_report(recipe, result, out)
