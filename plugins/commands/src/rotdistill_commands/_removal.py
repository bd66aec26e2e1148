"""Removing a run without what other runs stand on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rotdistill_core.execution.run_folder import RunFolder
from rotdistill_core.store.records import FileRecord, LedgerRecord


def format_size(size: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def files_to_delete(run: RunFolder, keep: set[str], keep_checkpoints: bool) -> list[Path]:
    """Return the files of a run that `remove` deletes, its ledger apart: not the files `keep` (relative to the folder of runs).

    `keep_checkpoints` spares the checkpoints and the documents at the top of the folder.
    """
    found = []
    for path in run.path.rglob("*"):
        inside = path.relative_to(run.path).as_posix()
        stays = keep_checkpoints and ("/" not in inside or inside.startswith("checkpoints/"))
        folder = path.is_dir() and not path.is_symlink()
        if not (
            folder
            or stays
            or inside == "ledger.jsonl"
            or path.relative_to(run.path.parent).as_posix() in keep
        ):
            found.append(path)
    return found


def shares(run: RunFolder, files: Iterable[Path]) -> str:
    """Say how large files of a run are, and what they are: by the folder in which they lie, the largest first."""
    sizes = Counter[str]()
    for path in files:
        inside = path.relative_to(run.path).parts
        sizes[inside[0] if len(inside) > 1 else "documents"] += path.lstat().st_size
    return f"{format_size(sizes.total())} ({', '.join(f'{what} {format_size(size)}' for what, size in sizes.most_common())})"


def remove(run: RunFolder, keep: set[str], keep_checkpoints: bool) -> int:
    """Delete what `doomed` returns; return how many bytes that freed.

    The ledger goes last, and keeps the lines of what is left: a removal that was cut short can be called again.
    """
    freed = 0
    for path in files_to_delete(run, keep, keep_checkpoints):
        freed += path.lstat().st_size
        path.unlink()
    for path in sorted(
        run.path.rglob("*"), reverse=True
    ):  # what is inside a folder comes before it
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()
    left = [record for record in run.ledger.records if _holds(record, run, keep_checkpoints)]
    if left:
        run.ledger.rewrite(left)
    else:
        freed += run.ledger.path.stat().st_size
        run.ledger.path.unlink()
        run.path.rmdir()
    return freed


def _holds(record: LedgerRecord, run: RunFolder, steps: bool) -> bool:
    """Return whether a record of the ledger still holds: its files are there. Steps count only if `steps`."""
    root = run.path.parent
    if isinstance(record, FileRecord):
        return run.owns(record.path) and (root / record.path).is_file()
    return steps and all((root / path).is_file() for path in record.paths() if run.owns(path))
