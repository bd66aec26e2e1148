"""Carrying out recipes and calling the command line inside a test."""

from __future__ import annotations

import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

from rotdistill_core.cli import main
from rotdistill_core.execution.executor import Executor
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.recipe.load import load_recipe


class SilentObserver:
    """What a run reports to: it keeps the lines and shows none."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, text: str) -> None:
        """Keep one line."""
        self.lines.append(text)


def run_recipe(path: Path, observer: Any = None) -> RunResult:
    """Carry out a recipe; `runs/` lies next to it."""
    watching = observer or SilentObserver()
    return Executor(load_recipe(path), path.parent / "runs", watching, lambda *_: None).go()


def command_line(*words: str) -> tuple[int, str, str]:
    """Call the command line in this process; return exit code, stdout and stderr."""
    out = StringIO()
    err = StringIO()
    code = 0
    arguments = mock.patch.multiple(sys, argv=["rotdistill", *words])
    handlers = mock.patch.object(signal, "signal")  # signal handlers belong to the caller
    with redirect_stdout(out), redirect_stderr(err), arguments, handlers:
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return code, out.getvalue(), err.getvalue()
