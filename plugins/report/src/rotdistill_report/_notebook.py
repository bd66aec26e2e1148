"""Executing the notebook that recomputes the rotations of a run."""

from __future__ import annotations

import importlib.resources
import os
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from rotdistill_core.errors import RotdistillError
from rotdistill_core.store.files import write_file

NAME = "rotation_sanity.ipynb"


def notebook_file() -> Traversable:
    """Return the notebook as it is installed, without outputs."""
    return importlib.resources.files("rotdistill_report") / NAME


def execute_notebook(folder: Path, timeout: float) -> str:
    """Execute the notebook on a run, write it there with its outputs, and return its verdict.

    Raises:
        RotdistillError: a cell raised; the message is one line. The notebook is written
            nevertheless, up to that cell.
    """
    notebook = nbformat.reads(notebook_file().read_text(encoding="utf-8"), as_version=4)
    environment = {
        "ROTDISTILL_RUN": str(folder.resolve()),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3")
    try:
        client.execute(env=os.environ | environment)
    except CellExecutionError as error:
        reason = error.evalue.partition("\n")[0]
        message = f"a cell of {folder / NAME} raised {error.ename}: {reason}"
        raise RotdistillError(message) from error
    finally:
        write_file(folder / NAME, [nbformat.writes(notebook).encode()])
    return _verdict(notebook)


def _verdict(notebook: Any) -> str:
    """Return the first line that the cell tagged `verdict` displays, as plain text."""
    cell = next(cell for cell in notebook.cells if "verdict" in cell.metadata.get("tags", ()))
    displays = (output for output in cell.outputs if output.output_type == "display_data")
    first_line = next(displays).data["text/markdown"].partition("\n")[0]
    return f"rotation sanity: {first_line.replace('**', '')}"
