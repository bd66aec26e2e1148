"""SHA256 of model files: several at once, and each once as long as it stays as it is."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter

from rotdistill_core.errors import SetupError
from rotdistill_core.store.files import json_blocks, write_file
from rotdistill_core.store.hashing import digest, sha256_of
from rotdistill_core.store.layout import MODEL_HASHES, user_cache
from rotdistill_core.store.plain import open_plain, read_bytes

SAMPLE_BYTES = 1 << 16
"""Bytes that a sample takes from each of about five places of a file."""
LEAST_REMEMBERED = 1 << 20
"""Bytes of the smallest file whose hash is remembered; smaller ones are hashed at once."""
MOST_REMEMBERED = 10_000
"""Files whose hashes are remembered, the newest ones."""
SETTLED_NANOSECONDS = 2_000_000_000
"""A file that changed more recently may change again without a new time, so it is not remembered
beyond this process."""


class _Known(NamedTuple):
    """A file that was hashed."""

    state: str
    """What distinguished it from other contents: its length, its times and the hash of a sample."""
    sha256: str
    mark: str
    """Hash of the rest, so that a damaged line counts for nothing."""


class FileHashes:
    """SHA256 of files, each of which is read once as long as it stays as it is.

    A file is the same while device, inode, length, both times of change (mtime and ctime) and a
    sample of its bytes are. A write shows in ctime even where a program sets mtime back. The known
    limit: bytes outside the sample that change without the file system, on a failing disk,
    go unseen as long as the cache has the file. `rotdistill check RUN` finds them: it reads every
    byte of the models, and never the cache.

    Args:
        cache: the JSON file that remembers hashes between processes; None: every file is read.
        warn: takes one line if the cache cannot be written.
    """

    def __init__(
        self, cache: Path | None = None, warn: Callable[[str], None] = lambda _: None
    ) -> None:
        self.cache = cache
        self.warn = warn
        self._made: dict[str, _Known] = {}
        """Device and inode -> what this object hashed."""
        self._unwritten: dict[str, _Known] = {}
        """Those of them that the cache should remember."""

    def of(self, paths: Sequence[Path]) -> list[str]:
        """Return the sha256 of each file.

        Raises:
            OSError: a file cannot be read.
        """
        with ThreadPoolExecutor() as pool:  # hashing lets other threads run
            hashes = list(pool.map(self._sha256, paths))
        if self.cache and self._unwritten:
            self._write(self.cache)
        return hashes

    def _sha256(self, path: Path) -> str:
        status = path.stat()
        if status.st_size < LEAST_REMEMBERED:
            return sha256_of(path)
        name, state = f"{status.st_dev}:{status.st_ino}", _state(path, status)
        known = self._made.get(name) or self._remembered.get(name)
        if known and known.state == state:
            return known.sha256
        age = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns)
        sha256 = sha256_of(path)
        if _state(path, path.stat()) == state:  # nobody wrote to it meanwhile
            self._made[name] = _Known(state, sha256, digest(name, state, sha256))
            if age > SETTLED_NANOSECONDS:
                self._unwritten[name] = self._made[name]
        return sha256

    @cached_property
    def _remembered(self) -> dict[str, _Known]:
        return _read(self.cache) if self.cache else {}

    def _write(self, cache: Path) -> None:
        """Add to the cache what is new; another process may have added to it, too."""
        new, self._unwritten = self._unwritten, {}
        older = {name: known for name, known in _read(cache).items() if name not in new}
        kept = dict([*older.items(), *new.items()][-MOST_REMEMBERED:])
        try:
            write_file(cache, json_blocks(kept, sort_keys=False))
        except SetupError as error:
            self.warn(f"{error} Models are hashed anew by each run.")


def remembered_hashes(warn: Callable[[str], None] = lambda _: None) -> FileHashes:
    """Return hashes that are remembered in the user's cache; removing it costs time alone."""
    return FileHashes(user_cache() / MODEL_HASHES, warn)


def sample_of(path: Path) -> Iterator[bytes]:
    """Yield a little of a file from each of about five places; a small file whole."""
    size = path.stat().st_size
    with open_plain(path) as stream:
        for position in range(0, size, max(SAMPLE_BYTES, size // 4)):
            stream.seek(position)
            yield stream.read(SAMPLE_BYTES)


def _state(path: Path, status: os.stat_result) -> str:
    sample = hashlib.sha256(b"".join(sample_of(path))).hexdigest()
    return f"{status.st_ctime_ns} {status.st_mtime_ns} {status.st_size} {sample}"


def _read(cache: Path) -> dict[str, _Known]:
    """Return what a cache remembers; nothing if it is missing or damaged."""
    try:
        found = TypeAdapter(dict[str, _Known]).validate_json(read_bytes(cache))
    except (OSError, ValueError):
        return {}
    return {
        name: known
        for name, known in found.items()
        if known.mark == digest(name, known.state, known.sha256)
    }
