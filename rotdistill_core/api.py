"""The Python interface: run and plan recipes from a notebook or a program.

from rotdistill_core import plan, run

result = run("recipes/tour_guide.toml", set={"chop.layers": 24})
result.to_pandas()
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING

from rotdistill_core.errors import RecipeError
from rotdistill_core.planning.machine import Machine, this_machine
from rotdistill_core.planning.plan import Plan, build_plan
from rotdistill_core.recipe.load import load_recipe, resolve_recipe
from rotdistill_core.recipe.resolved import ResolvedRecipe
from rotdistill_core.store.layout import RUNS_FOLDER

if TYPE_CHECKING:
    from rotdistill_core.execution.observers import RunObserver
    from rotdistill_core.execution.outcome import RunResult


class QuietObserver:
    """An observer that shows nothing."""

    def log(self, text: str) -> None:
        """Drop a line."""

    def progress(self, done: int, total: int, note: str) -> None:
        """Drop the progress of a step."""


def run(
    recipe: str | Path | ResolvedRecipe,
    *,
    set: Mapping[str, object] | None = None,  # noqa: A002  as `--set` on the command line
    runs: Path = RUNS_FOLDER,
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

    Raises:
        RunFailed: variants break a check; `outcome` holds the result.
        RotdistillError: anything else went wrong. Calling again resumes the run.
    """
    from rotdistill_core.execution.executor import Executor  # noqa: PLC0415  loads torch

    watching = observer or QuietObserver()
    resolved = _resolve(recipe, set or {})
    return Executor(resolved, runs, watching, watching.progress, fresh).go()


def plan(
    recipe: str | Path | ResolvedRecipe,
    *,
    set: Mapping[str, object] | None = None,  # noqa: A002  as `--set` on the command line
    runs: Path = RUNS_FOLDER,
    fresh: bool = False,
    machine: Machine | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Return what `run` would do: results in order, memory, disk and time. Nothing is written.

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
    return build_plan(resolved, runs, machine or this_machine(runs), fresh, log)


def _resolve(
    recipe: str | Path | ResolvedRecipe, overrides: Mapping[str, object]
) -> ResolvedRecipe:
    """Return a valid recipe with its overrides applied."""
    sets = [f"{key}={_as_toml(value, key)}" for key, value in overrides.items()]
    if not isinstance(recipe, ResolvedRecipe):
        return load_recipe(Path(recipe), sets)
    if not sets:
        return recipe
    # Observers are no part of the resolved tables, because they change no result.
    tables = {**recipe.resolved(), "observers": recipe.recipe.observers}
    return resolve_recipe(recipe.path, recipe.text, tables, sets)


def _as_toml(value: object, key: str) -> str:
    """Return a Python value as TOML.

    Raises:
        RecipeError: TOML has no such value.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Integral):
        return str(int(value))
    if isinstance(value, Real):
        return repr(float(value))
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(_as_toml(item, key) for item in value)}]"
    if isinstance(value, Mapping):
        pairs = [f"{_as_toml(str(k), key)} = {_as_toml(v, key)}" for k, v in value.items()]
        return f"{{{', '.join(pairs)}}}"
    raise RecipeError(
        f"set {key}: {value!r} is a {type(value).__name__}; "
        "a recipe holds numbers, texts, booleans, lists and tables."
    )
