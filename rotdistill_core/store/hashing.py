"""SHA256 of files and of JSON values."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from rotdistill_core.store.plain import open_plain


def sha256_of(path: Path) -> str:
    """Return the sha256 of a plain file, read in blocks.

    Raises:
        OSError: it cannot be read, or is no plain file.
    """
    with open_plain(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(*parts: object) -> str:
    """Return the sha256 of JSON values; the order of an object's keys does not matter."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
