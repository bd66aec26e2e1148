"""Execute notebooks/rotation_sanity.ipynb into the run's folder after every solve, and say its verdict.

By hand, for any run: `python -m rotdistill_rotation_sanity runs/tour-guide-...`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rotdistill_core import hookimpl
from rotdistill_core.errors import RotdistillError
from rotdistill_core.store.files import write_file

SECONDS = 300
"""An execution takes a few; many wide maps on few cores take longer. One that takes this long is given up."""


@hookimpl
def after_step(stage: str, folder: Path, reused: bool, log: Callable[[str], None]) -> None:
    """See `Specs.after_step`: after every `align` and `refine` that was solved just now."""
    if stage in ("align", "refine") and not reused:
        log(sanity(folder))


def sanity(folder: Path) -> str:
    """Execute the notebook on a run in a process of its own, and return its verdict.

    Its own process, because nbclient takes the handlers of SIGINT and SIGTERM for itself and does not give them back.

    Raises:
        RotdistillError: it could not be executed, in one line.
    """
    command = [sys.executable, __file__, str(folder)]
    with (
        TemporaryDirectory() as home
    ):  # nothing of the user's IPython profile takes part, and nothing is left there
        quiet = {"IPYTHONDIR": home, "JUPYTER_RUNTIME_DIR": home, "JUPYTER_PREFER_ENV_PATH": "1"}
        try:
            done = subprocess.run(
                command,
                env=os.environ | quiet,
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RotdistillError(f"the notebook was not done after {SECONDS} s") from error
    if done.returncode:
        raise RotdistillError(
            (
                done.stderr.strip() or f"the notebook's process ended with {done.returncode}"
            ).splitlines()[-1]
        )
    return done.stdout.strip()


def notebook() -> Path:
    """Return the notebook of this package."""
    return Path(__file__).with_suffix(".ipynb")


def execute(folder: Path) -> str:
    """Execute the notebook on a run, write it there with its outputs, and return its verdict.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised. The notebook is written all the same, up to that cell.
    """
    import nbformat
    from nbclient import NotebookClient

    made = nbformat.read(notebook(), as_version=4)
    plots = {
        "ROTDISTILL_RUN": str(folder.resolve()),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    try:
        NotebookClient(made, timeout=SECONDS, kernel_name="python3").execute(env=os.environ | plots)
    finally:
        write_file(folder / "rotation_sanity.ipynb", [nbformat.writes(made).encode()])
    return verdict(made)


def verdict(made: Any) -> str:
    """Return the first line of what the cell tagged `verdict` shows, as plain text."""
    cell = next(cell for cell in made.cells if "verdict" in cell.metadata.get("tags", ()))
    shown = next(
        output.data["text/markdown"]
        for output in cell.outputs
        if output.output_type == "display_data"
    )
    return f"rotation sanity: {shown.partition(chr(10))[0].replace('**', '')}"


def main() -> None:
    """Execute the notebook on the run that the command line names, and print its verdict."""
    from nbclient.exceptions import CellExecutionError

    try:
        print(execute(Path(sys.argv[1])))
    except CellExecutionError as error:
        folder = Path(sys.argv[1])
        sys.exit(
            f"a cell of {folder / 'rotation_sanity.ipynb'} raised {error.ename}: {error.evalue.partition(chr(10))[0]}"
        )


if __name__ == "__main__":
    main()
