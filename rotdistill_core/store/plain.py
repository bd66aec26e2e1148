"""Reading files that others made: plain files only, and no more than a stated number of bytes.

A named pipe waits for ever, and a device never ends. The system states neither: the size of both
is 0. So a path is looked at before it is opened, and bytes are counted while they are read.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

DOCUMENT_BYTES = 64 << 20
"""Longest document: a config, a shard index, a prompt, a document of a run."""
COLLECTION_BYTES = 1 << 30
"""Longest file of many records: a table of texts, a ledger, a tokenizer."""
KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
"""File type -> what it is called in an error."""


def read_bytes(path: Path, limit: int = DOCUMENT_BYTES) -> bytes:
    """Return the content of a plain file of at most `limit` bytes.

    Raises:
        OSError: it cannot be read, is no plain file, or is longer.
    """
    with open_plain(path) as stream:
        # The size that the system states is not asked: a file may grow, and some have size 0.
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise OSError(
            errno.EFBIG, f"it is longer than {limit} bytes, the most that is read of it", str(path)
        )
    return content


def read_text(path: Path, limit: int = DOCUMENT_BYTES, newline: str | None = None) -> str:
    """Return the text of a plain UTF-8 file of at most `limit` bytes.

    Args:
        path: the file.
        limit: the most bytes that it may have.
        newline: as in `open`: None makes every line end a `\\n`, "" leaves line ends as they are.

    Raises:
        OSError: see `read_bytes`.
        UnicodeDecodeError: it is not UTF-8.
    """
    content = io.BytesIO(read_bytes(path, limit))
    return io.TextIOWrapper(content, encoding="utf-8", newline=newline).read()


def open_plain(path: Path) -> io.BufferedReader:
    """Open a plain file for reading; links to one are followed.

    Raises:
        OSError: it cannot be opened, or is no plain file.
    """
    require_plain(path)
    # Without waiting, should a pipe have come in its place since.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    stream = os.fdopen(handle, "rb")
    try:
        _require_regular(path, os.fstat(handle))
    except OSError:
        stream.close()
        raise
    return stream


def is_file(path: Path) -> bool:
    """Return whether a file is there; no file has a name that the system does not take."""
    try:
        return path.is_file()
    except OSError:  # the name is too long, or links lead in a circle
        return False


def require_plain(path: Path, limit: int | None = None) -> None:
    """Refuse what is no plain file, or is longer than `limit` bytes, without opening it.

    Raises:
        OSError: saying what it is instead.
    """
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "its name holds a NUL character", str(path))
    status = path.stat()
    _require_regular(path, status)
    if limit is not None and status.st_size > limit:
        raise OSError(errno.EFBIG, f"it is longer than {limit} bytes", str(path))


def _require_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a plain file", str(path))
