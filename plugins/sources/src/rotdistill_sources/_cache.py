"""The cache of dequantised models: one folder for each .gguf file, by content hash."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from rotdistill_core.errors import SetupError
from rotdistill_core.store.files import json_blocks, write_file
from rotdistill_core.store.hashing import sha256_of
from rotdistill_core.store.layout import RunLayout, user_cache
from rotdistill_core.store.plain import read_text

WHOLE = "-whole"
"""Ends the name of a folder whose tensors are all known to come from its file. Older folders could
hold random ones in place of those that a file lacks."""


def dequantised_folder(gguf: Path, log: Callable[[str], None]) -> Path:
    """Return the bfloat16 folder of a .gguf file; make it if it is missing or torn.

    The folder is in the user's cache (`XDG_CACHE_HOME`, else `~/.cache`).

    Raises:
        SetupError: transformers cannot read the file, or the cache cannot be written.
    """
    folder = user_cache() / f"{gguf.stem}-{sha256_of(gguf)[:16]}{WHOLE}"
    if not is_complete(folder):
        log(f"{gguf.name}: dequantising into {folder}")
        _build(gguf, folder)
    if not (folder / RunLayout.CARD).is_file():
        # Only a missing card loads the gguf library: a plan opens cached models without it.
        from rotdistill_sources._gguf import write_card  # noqa: PLC0415

        write_card(gguf, folder / RunLayout.CARD)
    return folder


def is_complete(folder: Path) -> bool:
    """Return whether a folder has a manifest and all its files hash as the manifest says."""
    try:
        files = json.loads(read_text(folder / RunLayout.MANIFEST))
        return bool(files) and all(
            sha256_of(folder / name) == digest for name, digest in files.items()
        )
    except (OSError, ValueError):
        return False


def _build(gguf: Path, folder: Path) -> None:
    """Dequantise a file into a temporary folder, and rename that when it is complete."""
    # torch and transformers load here: a plan opens cached models without them.
    from rotdistill_sources._gguf import convert  # noqa: PLC0415

    cache = folder.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=folder.name + ".", suffix=".building", dir=cache))
    except OSError as error:
        raise SetupError(
            f"{cache}: cannot be written: {error.strerror}. "
            "Set XDG_CACHE_HOME to a folder that can."
        ) from error
    try:
        convert(gguf, building)
        files = {path.name: sha256_of(path) for path in sorted(building.iterdir())}
        write_file(building / RunLayout.MANIFEST, json_blocks(files))
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
    except OSError as error:
        # Another process may have been first, with the same bytes.
        if not is_complete(folder):
            raise SetupError(f"{gguf}: cannot be dequantised: {error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
