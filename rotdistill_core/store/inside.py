"""Keeping writes inside a folder, whatever the names of files are made from."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from rotdistill_core.characters import visible
from rotdistill_core.errors import SetupError

LONGEST_PART = 200
"""Bytes of one part of a name. File systems take 255; temporary names are longer than the name."""


def require_inside(folder: Path, name: str) -> None:
    """Refuse the name of a file that would not lie in a folder, or that no file can have.

    Links on the way are followed: what lies in a linked folder lies elsewhere. A link in the place
    of the file itself is fine, because a write replaces it.

    Args:
        folder: where the file has to lie; it need not exist.
        name: relative to the folder, with `/` between its parts.

    Raises:
        SetupError: naming folder and file.
    """
    shown = f"{name:.120}"
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or visible(name) != name:
        raise SetupError(
            f"{folder}: no file called {shown!r} is written: the name has to be relative, without "
            '"..", and of characters that are seen.'
        )
    if any(len(part.encode()) > LONGEST_PART for part in parts):
        raise SetupError(
            f"{folder}: no file called {shown!r} is written: a part of the name is longer than "
            f"{LONGEST_PART} bytes."
        )
    parent = (folder / name).parent
    if not parent.resolve().is_relative_to(folder.resolve()):
        raise SetupError(
            f"{parent}: is a link that leads out of {folder}, so nothing is written there. Put a "
            "folder in its place."
        )
