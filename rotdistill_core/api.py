"""The Python interface: run and plan recipes from a notebook or a program.

from rotdistill_core import plan, run

result = run("recipes/tour_guide.toml", set={"chop.layers": 24})
result.to_pandas()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rotdistill_core.checkpoint.open import without_downloads
from rotdistill_core.execution.observers import QuietObserver
from rotdistill_core.forward.ranks import start_ranks
from rotdistill_core.planning.calibration import kept_profile
from rotdistill_core.planning.machine import Machine, this_machine
from rotdistill_core.planning.plan import Plan, build_plan
from rotdistill_core.recipe.load import load_recipe, with_overrides
from rotdistill_core.recipe.resolved import ResolvedRecipe
from rotdistill_core.store.layout import RUNS_FOLDER

if TYPE_CHECKING:
    from rotdistill_core.execution.observers import RunObserver
    from rotdistill_core.execution.outcome import RunResult


def run(
    recipe: str | Path | ResolvedRecipe,
    *,
    set: Mapping[str, object] | None = None,  # noqa: A002  as `--set` on the command line
    runs: str | Path = RUNS_FOLDER,
    fresh: bool = False,
    observer: RunObserver | None = None,
) -> RunResult:
    """Carry out a recipe; reuse what an earlier run made from the same inputs.

    Args:
        recipe: the path of a recipe, or a recipe from `load_recipe`.
        set: overrides, such as `{"chop.layers": 24}`; the first part of a key may be a step's id.
        runs: the folder of all runs.
        fresh: reuse nothing that an earlier run made.
        observer: takes lines and progress, and may implement any observer hook. Without one,
            nothing is printed.

    In a process that `torchrun` started, the run is carried out together with the others. All of
    them return the result; only the leading one has metric rows and summaries.

    Raises:
        RunFailed: variants break a check; `outcome` holds the result.
        RotdistillError: anything else went wrong. Calling again resumes the run.
    """
    from rotdistill_core.execution.executor import Executor  # noqa: PLC0415  loads torch

    ranks = start_ranks()
    watching = observer if observer and ranks.leads else QuietObserver()
    with ranks.together():
        resolved = _resolve(recipe, set or {})
        return Executor(resolved, Path(runs), watching, watching.progress, fresh, ranks).go()


def plan(
    recipe: str | Path | ResolvedRecipe,
    *,
    set: Mapping[str, object] | None = None,  # noqa: A002  as `--set` on the command line
    runs: str | Path = RUNS_FOLDER,
    fresh: bool = False,
    machine: Machine | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Return what `run` would do: results in order, memory, disk and time.

    No run is touched. A `.gguf` model is converted first, once.

    Times are None until this machine has been measured, which the command line does.

    Args:
        recipe: the path of a recipe, or a recipe from `load_recipe`.
        set: overrides, as for `run`.
        runs: the folder of all runs.
        fresh: as for `run`.
        machine: the machine to plan for; this one if not given.
        log: takes a line of text when a model has to be located.

    Raises:
        RotdistillError: the recipe is wrong, or its models or texts are missing or do not fit.
    """
    resolved = _resolve(recipe, set or {})
    folder = Path(runs)
    here = machine or replace(this_machine(folder), profile=kept_profile())
    with without_downloads():
        return build_plan(resolved, folder, here, fresh, log)


def _resolve(
    recipe: str | Path | ResolvedRecipe, overrides: Mapping[str, object]
) -> ResolvedRecipe:
    """Return a valid recipe with its overrides applied."""
    if not isinstance(recipe, ResolvedRecipe):
        return load_recipe(recipe, overrides)
    if not overrides:
        return recipe
    return with_overrides(recipe, overrides)
