"""Remove a run, except the files that results of other runs consist of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from rotdistill_core.errors import SetupError
from rotdistill_core.execution.run_folder import RunFolder
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.presence import REMOVING, at_work
from rotdistill_core.store.records import (
    CheckpointRecord,
    FailureRecord,
    FileRecord,
    LedgerRecord,
    RemovalRecord,
    StepRecord,
)


def format_size(size: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def files_to_delete(run: RunFolder, keep: Collection[str], keep_checkpoints: bool) -> list[Path]:
    """Return the files of a run that `remove` deletes, except its ledger.

    Args:
        run: the run.
        keep: files that stay, relative to the folder of runs.
        keep_checkpoints: checkpoints and the documents at the top of the folder stay too.
    """
    files = []
    for path in run.path.rglob("*"):
        inside = path.relative_to(run.path).as_posix()
        is_document = "/" not in inside
        # Where inputs changed, newer checkpoints lie in `checkpoints-<key>`.
        folder = inside.partition("/")[0].partition("-")[0]
        is_checkpoint = not is_document and folder == RunLayout.CHECKPOINTS
        stays = (
            _is_folder(path)
            or inside == RunLayout.LEDGER
            or path.relative_to(run.path.parent).as_posix() in keep
            or (keep_checkpoints and (is_document or is_checkpoint))
        )
        if not stays:
            files.append(path)
    return files


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def describe_files(run: RunFolder, files: Iterable[Path]) -> str:
    """Return the size of files of a run, with the share of each folder, the largest first."""
    sizes = Counter[str]()
    for path in files:
        parts = path.relative_to(run.path).parts
        sizes[parts[0] if len(parts) > 1 else "documents"] += path.lstat().st_size
    shares = ", ".join(f"{folder} {format_size(size)}" for folder, size in sizes.most_common())
    return f"{format_size(sizes.total())} ({shares})"


def remove(run: RunFolder, keep: Collection[str], keep_checkpoints: bool) -> int:
    """Delete the files that `files_to_delete` returns; return how many bytes that freed.

    The ledger goes last and keeps the records of the files that stay. So a removal that was
    interrupted can be repeated.

    Raises:
        SetupError: a process carries out the run's recipe at this moment.
    """
    with at_work(run.path, REMOVING) as own_mark:
        if run.runners:
            raise SetupError(
                f"{run.path}: is in progress: {', '.join(run.runners)} carries out its recipe. "
                "Nothing was removed; stop that first, or wait for its end."
            )
        freed = _remove(
            run, {*keep, own_mark.relative_to(run.path.parent).as_posix()}, keep_checkpoints
        )
    if not any(run.path.iterdir()):
        run.path.rmdir()
    return freed


def _remove(run: RunFolder, keep: Collection[str], keep_checkpoints: bool) -> int:
    """Delete files and rewrite or delete the ledger; return how many bytes that freed."""
    freed = 0
    for path in files_to_delete(run, keep, keep_checkpoints):
        freed += path.lstat().st_size
        path.unlink()
    _remove_empty_folders(run.path)
    ledger = run.ledger
    kept = [record for record in ledger.records if _is_still_true(record, run, keep_checkpoints)]
    if kept:
        gone = [record for record in ledger.records if record not in kept]
        ledger.rewrite([*kept, _removal(gone)])
        return freed
    freed += ledger.path.stat().st_size
    ledger.path.unlink()
    return freed


def _remove_empty_folders(root: Path) -> None:
    # In reverse order the content of a folder comes before the folder.
    for path in sorted(root.rglob("*"), reverse=True):
        if _is_folder(path) and not any(path.iterdir()):
            path.rmdir()


def _removal(gone: Sequence[LedgerRecord]) -> RemovalRecord:
    """Return what says that records are not lost but were removed."""
    earlier = [record for record in gone if isinstance(record, RemovalRecord)]
    steps = [step for record in earlier for step in record.steps]
    steps += [record.id for record in gone if isinstance(record, StepRecord)]
    checkpoints = [variant for record in earlier for variant in record.variants]
    checkpoints += [record.variant for record in gone if isinstance(record, CheckpointRecord)]
    return RemovalRecord(
        steps=tuple(dict.fromkeys(steps)), variants=tuple(dict.fromkeys(checkpoints))
    )


def _is_still_true(record: LedgerRecord, run: RunFolder, keep_steps: bool) -> bool:
    """Return whether the files of a record exist.

    Args:
        record: a record of the run's ledger.
        run: the run.
        keep_steps: whether records of steps and checkpoints may stay; those of files always may.
    """
    root = run.path.parent
    if isinstance(record, RemovalRecord | FailureRecord):
        return False  # a new removal takes the place of the old; no step is left to have failed
    if isinstance(record, FileRecord):
        return run.owns(record.path) and (root / record.path).is_file()
    return keep_steps and all((root / path).is_file() for path in record.paths() if run.owns(path))
