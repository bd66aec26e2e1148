"""The sources `.gguf` and `package:`: .gguf files on disk or inside an installed Python package.

Each file is dequantised once into a bfloat16 Hugging Face folder, which a cache keeps by content
hash. bfloat16 rounds a dequantised 4- or 8-bit weight by far less than the quantisation did, and
halves the folder.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from rotdistill_core import hookimpl
from rotdistill_core.errors import SetupError
from rotdistill_sources._cache import dequantised_folder

PACKAGE = "package:"


@hookimpl
def locate(reference: str, log: Callable[[str], None]) -> Path:
    """Return the folder of `file.gguf`, or of `package:module/file.gguf`.

    Raises:
        SetupError: there is no such file, or it cannot be dequantised.
    """
    if reference.startswith(PACKAGE):
        return dequantised_folder(find_in_package(reference), log)
    path = Path(reference).expanduser()
    if not path.is_file():
        raise SetupError(f"{reference}: there is no such .gguf file.")
    return dequantised_folder(path, log)


def find_in_package(reference: str) -> Path:
    """Return the file of `package:module/file.gguf`, without importing the module.

    Raises:
        SetupError: the package is not installed, or has no such file.
    """
    module, _, inside = reference.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    roots = list(spec.submodule_search_locations or []) if spec else []
    if not roots:
        install = f"pip install --no-deps {module.replace('_', '-')}"
        raise SetupError(
            f"{reference}: no Python package {module} is installed; install it ({install})."
        )
    root = Path(roots[0]).resolve()
    path = (root / inside).resolve()
    if not path.is_relative_to(root) or path.suffix != ".gguf" or not path.is_file():
        raise SetupError(f"{reference}: the package {module} has no .gguf file {inside}.")
    return path
