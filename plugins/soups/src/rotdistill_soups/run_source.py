"""Checkpoints of earlier runs as models: `run:NAME/VARIANT`, or `run:NAME/path/inside`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path, PurePosixPath

from rotdistill_core import hookimpl
from rotdistill_core.errors import SetupError
from rotdistill_core.execution.run_folder import RunFolder
from rotdistill_core.store.layout import RUNS_FOLDER


@hookimpl
def locate(reference: str, log: Callable[[str], None]) -> Path:
    """See `HookSpecs.locate`.

    NAME is the name of a recipe, where `runs` holds one run of it, or of the run's folder. A path
    inside leads to an adapter that a step left. All its files are compared with their hashes.
    """
    name, _, inside = reference.removeprefix("run:").partition("/")
    runs = [RunFolder(path) for path in _runs_called(name)]
    checkpoints = {run.path: run.checkpoints for run in runs}
    matches: dict[Path, Path] = {}
    for run in runs:
        record = run.checkpoints.get(inside)
        folder = run.path / inside if "/" in inside else record and run.folder_of(record)
        if folder and folder.is_dir():
            matches[run.path] = folder
    if not matches:
        raise SetupError(
            f"{reference}: {_missing(inside, checkpoints)}. Run its recipe first; a reference is "
            "written run:NAME/VARIANT."
        )
    if len(matches) > 1:
        raise SetupError(_ambiguous(reference, inside, matches))
    [(path, folder)] = matches.items()
    _require_true(RunFolder(path), inside, reference)
    log(f"{reference} is {folder}")
    return folder


def _require_true(run: RunFolder, inside: str, reference: str) -> None:
    """Raise unless what a reference means is as the run committed it.

    Raises:
        CheckFailed: a file is not what was committed.
        SetupError: no file in the folder was committed.
    """
    if "/" not in inside:
        run.require_checkpoint(inside)
        return
    below = f"{run.path.resolve().name}/{PurePosixPath(inside)}/"
    files = [run.local(file) for file in run.ledger.committed.values()]
    committed = [file for file in files if file.path.startswith(below)]
    if not committed:
        raise SetupError(
            f"{reference}: the run has committed no file there, so its step is not finished. Run "
            "its recipe again."
        )
    for file in committed:
        run.store.require(file)


def _runs_called(name: str) -> list[Path]:
    """Return the folders of the runs of a recipe, or the one run of that full name."""
    pattern = re.compile(re.escape(name) + "(-[0-9a-f]{8})?")
    return sorted(p for p in RUNS_FOLDER.glob("*") if pattern.fullmatch(p.name) and p.is_dir())


def _missing(inside: str, checkpoints: Mapping[Path, Mapping[str, object]]) -> str:
    """Return why no run has what is asked for."""
    if not checkpoints:
        return f"{RUNS_FOLDER.resolve()} holds no run of that name"
    variants = sorted({variant for by_variant in checkpoints.values() for variant in by_variant})
    return f"that run has no {inside or 'variant'}; its variants: {', '.join(variants)}"


def _ambiguous(reference: str, inside: str, matches: Mapping[Path, Path]) -> str:
    """Return the message for several runs that have what is asked for."""
    modified = {run: folder.stat().st_mtime for run, folder in matches.items()}
    newest = sorted(matches, key=lambda run: modified[run], reverse=True)
    listed = ", ".join(
        f"run:{run.name}/{inside} (of {_local_time(modified[run])})" for run in newest
    )
    return (
        f"{reference}: {len(matches)} runs have it, the newest first: {listed}. Write one of these "
        f"in its place; `rotdistill diff {newest[1].name} {newest[0].name}` shows how they differ."
    )


def _local_time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M}"
