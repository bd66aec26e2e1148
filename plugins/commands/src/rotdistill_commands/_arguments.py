"""The argument RUN of several verbs: how a run is named, found and completed."""

from __future__ import annotations

from typing import Annotated

import typer

from rotdistill_core.characters import visible
from rotdistill_core.execution.run_folder import RunFolder, all_runs, find_run
from rotdistill_core.store.layout import RUNS_FOLDER
from rotdistill_core.terminal import literal, stderr_console


def log(text: str) -> None:
    """Print one line on stderr."""
    stderr_console().print(literal(text), soft_wrap=True)


def requested_run(name: str) -> RunFolder:
    """Return the run in `runs/` that the command line names.

    The name of a recipe that has several runs means the newest finished one; a line on stderr names
    it.

    Raises:
        RecipeError: no run has this name, or several begin with it.
    """
    return find_run(name, RUNS_FOLDER, log)


def complete_run_names(incomplete: str) -> list[str]:
    """Return the names of runs that begin with `incomplete`."""
    names = [run.path.name for run in all_runs(RUNS_FOLDER)]
    # A shell prints what it completes.
    return [name for name in names if name.startswith(incomplete) and visible(name) == name]


_RUN_ARGUMENT = typer.Argument(
    metavar="RUN",
    help="A run's name, the beginning of it, or its folder.",
    show_default=False,
    autocompletion=complete_run_names,
)
RunName = Annotated[str, _RUN_ARGUMENT]
RunNameIfAny = Annotated[str | None, _RUN_ARGUMENT]
