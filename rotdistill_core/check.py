"""Recompute from disk what a run claims: hashes of every committed file, and that stored rotations are rotations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open

from rotdistill_core.errors import CheckFailed, RecipeError
from rotdistill_core.ledger import File, Ledger, Store
from rotdistill_core.maps import Rotation

TOLERANCE = 1e-5


def check_run(folder: Path) -> dict[str, Any]:
    """Return how many files and rotations were checked, and a paragraph for everything that does not hold.

    Raises:
        RecipeError: the folder is not a run.
    """
    ledger = Ledger(folder.resolve())
    if not ledger.records:
        raise RecipeError(f"{folder}: is not a run: it has no ledger.jsonl with a valid line.")
    store = Store(folder.resolve().parent)
    files = {r["path"]: File(r["path"], r["bytes"], r["sha256"]) for r in ledger.records if r["kind"] == "file"}
    problems = [f"{store.root / f.path}: does not match its sha256 in the ledger." for f in files.values() if not store.verify(f)]
    rotations = [p for p in files if "/rotations" in p and p.endswith(".safetensors") and "layer_" in p and (store.root / p).is_file()]
    for path in rotations:
        with safe_open(store.root / path, "pt") as handle:
            try:
                Rotation(handle.get_tensor("map")).verify(TOLERANCE, path)
            except CheckFailed as error:
                problems.append(str(error))
    return {"run": folder.name, "files": len(files), "rotations": len(rotations), "problems": problems}
