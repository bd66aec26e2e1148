"""After every solved alignment, execute a notebook that recomputes the run's rotations from disk.

The notebook, `rotation_sanity.ipynb`, stays in the run's folder with its outputs. By hand, for any
run: `python -m rotdistill_report.rotation_sanity runs/tour-guide-...`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from rotdistill_core import hookimpl
from rotdistill_core.errors import RotdistillError

SECONDS = 300
"""Limit of one execution. It takes a few seconds; many wide maps on few cores take longer."""


@hookimpl
def after_step(stage: str, folder: Path, reused: bool, log: Callable[[str], None]) -> None:
    """See `HookSpecs.after_step`: after every `align` and `refine` that was not reused."""
    if stage in ("align", "refine") and not reused:
        log(execute_in_subprocess(folder))


def execute_in_subprocess(folder: Path) -> str:
    """Execute the notebook on a run, in a process of its own, and return its verdict.

    In this process nbclient would take over the handlers of SIGINT and SIGTERM and keep them.

    Raises:
        RotdistillError: the notebook failed or took longer than `SECONDS`; the message is one line.
    """
    # -P: a module of the current folder must not shadow an installed one.
    command = [sys.executable, "-P", "-m", "rotdistill_report.rotation_sanity", str(folder)]
    # Neither reads the user's IPython profile nor writes to it.
    with TemporaryDirectory() as home:
        jupyter = {"IPYTHONDIR": home, "JUPYTER_RUNTIME_DIR": home, "JUPYTER_PREFER_ENV_PATH": "1"}
        try:
            done = subprocess.run(
                command,
                env=os.environ | jupyter,
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RotdistillError(f"the notebook was not done after {SECONDS} s") from error
    if done.returncode:
        exited = f"the notebook's process ended with {done.returncode}"
        raise RotdistillError((done.stderr.strip() or exited).splitlines()[-1])
    return done.stdout.strip()


def main() -> None:
    """Execute the notebook on the run that the command line names, and print its verdict."""
    # Observers are loaded with the recipe; nbclient only when a notebook is executed.
    from rotdistill_report._notebook import execute_notebook  # noqa: PLC0415

    try:
        print(execute_notebook(Path(sys.argv[1]), SECONDS))
    except RotdistillError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
