"""Who works in a run's folder at this moment: processes that run its recipe, or that remove it.

Each leaves a file there while it works, named after its place and process id. A file whose process
is gone says nothing; the next run at the same place sweeps it. No lock is held, since some file
systems have none.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rotdistill_core.store.files import make_folder, unwritable
from rotdistill_core.store.place import is_alive, pid_in_name, this_place
from rotdistill_core.store.plain import read_bytes, read_text

RUNNING = "running"
REMOVING = "removing"


@contextmanager
def at_work(folder: Path, work: str) -> Iterator[Path]:
    """Leave a file in a run's folder that says what this process does there.

    Two processes that each leave theirs first, and look for the other's then, cannot miss each
    other.

    Args:
        folder: the run's folder; made if it is missing.
        work: `RUNNING` or `REMOVING`.

    Yields:
        The file, which is removed at the end.

    Raises:
        SetupError: the disk refuses.
    """
    # Named like the temporary files of `write_file`, so that it is swept like them.
    path = this_place().temporary(folder / work, os.getpid())
    about = {"host": socket.gethostname(), "started": _started(os.getpid())}
    try:
        make_folder(folder)
        path.write_text(json.dumps(about), encoding="utf-8")
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def others_at_work(folder: Path, work: str) -> list[str]:
    """Return the other processes that do something in a run's folder, in words.

    Of a process on another host, or in another container, nothing is known but that it has not
    ended in order.
    """
    others = []
    here = this_place()
    for path in sorted(folder.glob(f"{work}.*.tmp")):
        pid, local = pid_in_name(path), here.pid_of(path)
        if pid is None or local == os.getpid():
            continue
        try:
            about = json.loads(read_text(path))
            host, started = str(about["host"]), about["started"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # it has ended since, or was killed while it wrote this
        if local is None and not here.has_left(path):
            where = host if host != socket.gethostname() else f"{host}, in another container"
            others.append(f"process {pid} on {where} (if that has ended, remove {path})")
        elif local is not None and is_alive(local) and started == _started(local):
            others.append(f"process {pid}")
    return others


def _started(pid: int) -> str:
    """Return when a process started, as its system counts; empty where that is not known.

    Ids are used again, so an id alone would not say that it is the same process.
    """
    try:
        status = read_bytes(Path(f"/proc/{pid}/stat")).decode(errors="replace")
    except OSError:
        return ""
    return status.rpartition(")")[2].split()[19]  # field 22 of proc(5); the name may hold blanks
