"""Checkpoints of earlier runs as models: `run:NAME/VARIANT`, or `run:NAME/path/inside`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from rotdistill_core import hookimpl
from rotdistill_core.errors import SetupError
from rotdistill_core.store.layout import RUNS_FOLDER
from rotdistill_core.store.ledger import Ledger


@hookimpl
def locate(reference: str, log: Callable[[str], None]) -> Path:
    """See `HookSpecs.locate`.

    NAME is the name of a recipe, where `runs` holds one run of it, or of the run's folder. A path
    inside leads to an adapter that a step left.
    """
    name, _, inside = reference.removeprefix("run:").partition("/")
    checkpoints = {run: saved_checkpoints(run) for run in _runs_called(name)}
    matches: dict[Path, Path] = {}
    for run, by_variant in checkpoints.items():
        folder = run / inside if "/" in inside else by_variant.get(inside)
        if folder and folder.is_dir():
            matches[run] = folder
    if not matches:
        raise SetupError(
            f"{reference}: {_missing(inside, checkpoints)}. Run its recipe first; a reference is "
            "written run:NAME/VARIANT."
        )
    if len(matches) > 1:
        raise SetupError(_ambiguous(reference, inside, matches))
    [folder] = matches.values()
    log(f"{reference} is {folder}")
    return folder


def saved_checkpoints(run: Path) -> dict[str, Path]:
    """Return the newest checkpoint of each variant that a run's ledger commits."""
    return {record.variant: run.parent / record.folder for record in Ledger(run).checkpoints}


def _runs_called(name: str) -> list[Path]:
    """Return the folders of the runs of a recipe, or the one run of that full name."""
    pattern = re.compile(re.escape(name) + "(-[0-9a-f]{8})?")
    return sorted(p for p in RUNS_FOLDER.glob("*") if pattern.fullmatch(p.name) and p.is_dir())


def _missing(inside: str, checkpoints: Mapping[Path, Mapping[str, Path]]) -> str:
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
