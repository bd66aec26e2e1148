"""Write the report of a finished run again, from its ledger."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rotdistill_core.checkpoint.open import open_pair
from rotdistill_core.errors import RecipeError, RotdistillError
from rotdistill_core.evaluation.gates import broken_gates
from rotdistill_core.evaluation.metrics import FAILED
from rotdistill_core.evaluation.rows import MetricRow, failed_variants
from rotdistill_core.execution.outcome import RunResult, StepResult
from rotdistill_core.execution.run_folder import RunFolder
from rotdistill_core.plugin.registry import OBSERVERS, load_plugin, plugin_manager
from rotdistill_core.recipe.document import Check
from rotdistill_core.recipe.load import load_recipe, resolve_recipe
from rotdistill_core.recipe.resolved import ResolvedRecipe
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.ledger import ArtifactStore
from rotdistill_core.store.output import StepOutput


def rewrite_report(run: RunFolder, log: Callable[[str], None]) -> Path:
    """Give the run's results to the `report` observer again; return the path of the page.

    Args:
        run: a finished run.
        log: receives lines for the user.

    Raises:
        RecipeError: the run is not finished.
        SetupError: one of its models cannot be opened any more.
        CheckFailed: a document of the run is not what was committed.
    """
    if run.state != "done":
        problem = (
            f"{run.path}: is {run.state}; there is a report when its recipe has run to the end."
        )
        raise RecipeError(" ".join([problem, *map(str, run.failures)]))
    layout = run.layout
    text = (run.read(RunLayout.RECIPE) or b"").decode()
    loaded = _with_file(run, resolve_recipe(layout.recipe, text, {**run.recipe}))
    recipe = loaded.recipe
    rows = run.rows()
    outcome = RunResult(
        folder=run.path,
        rows=rows,
        steps=_step_results(run),
        checkpoints=_checkpoints(run),
        summaries=[],
        pair=open_pair(recipe.teacher, recipe.student, recipe.anchor, log),
        model_parity={each.role: each.result for each in run.ledger.parities if each.role},
        parity={each.variant: each.result for each in run.ledger.parities if each.variant},
        failed=_failures(run, rows, recipe.check, loaded.baseline),
    )
    manager = plugin_manager()
    manager.register(load_plugin(OBSERVERS, "report")[0])
    out = StepOutput(ArtifactStore(run.path.resolve().parent), run.ledger, "report")
    manager.hook.run_ended(recipe=loaded, result=outcome, out=out, log=log)
    return layout.report


def _with_file(run: RunFolder, loaded: ResolvedRecipe) -> ResolvedRecipe:
    """Return the recipe of a run with the file that it was run from, for commands that run it.

    Overrides are not recorded: with some, the file alone is another recipe, and no command is
    given.
    """
    for start in reversed(run.ledger.starts):
        with suppress(RotdistillError, OSError):
            found = load_recipe(os.path.relpath(run.path.parent / start.recipe))
            if start.recipe and found.digest() == loaded.digest():
                return replace(loaded, path=found.path)
    return replace(loaded, sets=None)


def _checkpoints(run: RunFolder) -> dict[str, Path]:
    """Return variant -> folder of its checkpoint; the documents of each hash true.

    Raises:
        CheckFailed: one does not, or is gone.
    """
    for record in run.checkpoints.values():
        for file in record.files:
            if not file.path.endswith(".safetensors"):  # no report reads weights
                run.store.require(file)
    return {variant: run.folder_of(record) for variant, record in run.checkpoints.items()}


def _step_results(run: RunFolder) -> dict[tuple[str, str], StepResult]:
    """Return (variant, step id) -> result for all steps that the run has a record of."""
    results = {}
    for variant, chain in run.chains().items():
        for step, record in chain.items():
            results[variant, step] = StepResult(
                key=record.key,
                reused=any(not run.owns(file.path) for file in record.files),
                seconds=record.seconds,
                notes=record.notes,
                report=record.report,
            )
    return results


def _failures(
    run: RunFolder, rows: list[MetricRow], check: Check, baseline: str
) -> dict[str, list[str]]:
    """Return variant -> the checks that it breaks.

    A variant that failed while it was made has no scores to recompute the failure from; the ledger
    says how a step of it failed.
    """
    scored = [row for row in rows if row.metric != FAILED]
    failures = broken_gates(scored, check, baseline)
    of_steps = {failure.variant: failure.message for failure in run.failures}
    unknown = "it broke a check when it was made; its recipe, run again, says which."
    for variant in failed_variants(rows):
        failures.setdefault(variant, [of_steps.get(variant, unknown)])
    return failures
