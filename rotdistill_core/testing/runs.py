"""TODO: rotdistill_core.testing.runs."""

from __future__ import annotations

import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from rotdistill_core.execution.executor import Executor
from rotdistill_core.recipe.load import load_recipe

if TYPE_CHECKING:
    from rotdistill_core.execution.outcome import RunResult


class SilentObserver:
    """What a run reports to: it keeps the lines, and shows none."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, text: str) -> None:  # noqa: D102
        self.lines.append(text)


def run_recipe(path: Path, screen: Any = None) -> RunResult:
    """Carry out a recipe, in `runs/` beside it."""

    return Executor(
        load_recipe(path), path.parent / "runs", screen or SilentObserver(), lambda *_: None
    ).go()


def command_line(*words: str) -> tuple[int, str, str]:
    """Call the command line in this process; return its exit code and what it printed on stdout and on stderr."""
    from rotdistill_core.cli import main

    out, err, code = StringIO(), StringIO(), 0
    inside = (
        mock.patch.multiple(sys, argv=["rotdistill", *words]),
        mock.patch.object(signal, "signal"),
    )  # handlers are the caller's
    with redirect_stdout(out), redirect_stderr(err), inside[0], inside[1]:
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return code, out.getvalue(), err.getvalue()
