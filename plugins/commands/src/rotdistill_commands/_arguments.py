"""TODO: rotdistill_commands._arguments."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from rotdistill_core.execution.run_folder import RunFolder, all_runs, find_run
from rotdistill_core.store.layout import RUNS_FOLDER
from rotdistill_core.terminal import stderr_console


def requested_run(name: str) -> RunFolder:
    """Return the run that somebody asks for on the command line, in `runs/`; of several runs of one recipe the newest, and say so."""
    return find_run(
        name, RUNS_FOLDER, lambda text: stderr_console().print(escape(text), soft_wrap=True)
    )


def _complete_run_names(incomplete: str) -> list[str]:
    return [run.path.name for run in all_runs(RUNS_FOLDER) if run.path.name.startswith(incomplete)]


RunName = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A run's name, the beginning of it, or its folder.",
        show_default=False,
        autocompletion=_complete_run_names,
    ),
]
