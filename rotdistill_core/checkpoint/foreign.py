"""Files that somebody else made, read by libraries that may raise anything over them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rotdistill_core.errors import RotdistillError, SetupError

SHOWN_CHARACTERS = 400
"""Length at which the words of a library are cut."""


@contextmanager
def reading(path: Path | str, what: str) -> Iterator[None]:
    """Turn whatever a library raises over somebody's file into one paragraph that names it.

    Errors of this program, and want of memory, pass as they are.

    Args:
        path: the file or folder that is read.
        what: what it is, for the error: "its tokenizer".

    Raises:
        SetupError: the library failed.
    """
    try:
        yield
    except (RotdistillError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's; this module loads without torch
            raise
        raise SetupError(f"{path}: {what} cannot be loaded: {_in_one_line(error)}") from error


def _in_one_line(error: Exception) -> str:
    """Return the words of an error as one sentence, with its class where they say little."""
    words = " ".join(str(error).split())
    if len(words) > SHOWN_CHARACTERS:
        words = words[:SHOWN_CHARACTERS].rstrip() + " ..."
    if not isinstance(error, OSError | ValueError):
        words = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return words if words.endswith(".") else f"{words}."
