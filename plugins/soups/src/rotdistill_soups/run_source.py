"""Checkpoints of earlier runs as models: `run:NAME/VARIANT`, and `run:NAME/path/inside` for an adapter that a step left."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from rotdistill_core import hookimpl
from rotdistill_core.errors import SetupError
from rotdistill_core.store.layout import RUNS_FOLDER
from rotdistill_core.store.ledger import Ledger


@hookimpl
def locate(reference: str, log: Callable[[str], None]) -> Path:
    """See `Specs.locate`. NAME is that of a recipe, where `runs` holds one run of it, or of the run's folder."""
    name, _, inside = reference.removeprefix("run:").partition("/")
    folders = sorted(
        p
        for p in RUNS_FOLDER.glob("*")
        if re.fullmatch(re.escape(name) + "(-[0-9a-f]{8})?", p.name) and p.is_dir()
    )
    saved = {folder: checkpoints(folder) for folder in folders}
    found = {f: f / inside if "/" in inside else saved[f].get(inside) for f in folders}
    there = {folder: path for folder, path in found.items() if path and path.is_dir()}
    if len(there) == 1:
        path = next(iter(there.values()))
        log(f"{reference} is {path}")
        return path
    if there:
        newest = sorted(there, key=lambda folder: there[folder].stat().st_mtime, reverse=True)
        dated = [
            (
                f"run:{f.name}/{inside}",
                datetime.fromtimestamp(there[f].stat().st_mtime).astimezone(),
            )
            for f in newest
        ]
        listed = ", ".join(f"{one} (of {when:%Y-%m-%d %H:%M})" for one, when in dated)
        differ = f"`rotdistill diff {newest[1].name} {newest[0].name}` shows how they differ"
        raise SetupError(
            f"{reference}: {len(there)} runs have it, the newest first: {listed}. Write one of these in its place; {differ}."
        )
    variants = ", ".join(sorted({variant for each in saved.values() for variant in each}))
    why = (
        f"that run has no {inside or 'variant'}; its variants: {variants}"
        if folders
        else f"{RUNS_FOLDER.resolve()} holds no run of that name"
    )
    raise SetupError(
        f"{reference}: {why}. Run its recipe first; a reference is written run:NAME/VARIANT."
    )


def checkpoints(folder: Path) -> dict[str, Path]:
    """Return the newest checkpoint of each variant that a run's ledger commits."""
    saved = Ledger(folder).checkpoints
    return {record.variant: folder.parent / record.folder for record in saved}
