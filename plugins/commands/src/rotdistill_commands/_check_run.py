"""Recompute from disk what a run claims: hashes, that its maps are maps and lead back, that its exact folds can be taken back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import UNDO, Weights, restore_undo, restore_weights
from rotdistill_core.errors import CheckFailed, RecipeError
from rotdistill_core.linalg.maps import Gauge, Map, Rotation, restore_maps, tensor_of
from rotdistill_core.recipe.document import StudentRef
from rotdistill_core.store.files import CommittedFile
from rotdistill_core.store.ledger import ArtifactStore, Ledger

TOLERANCE = 1e-5


def check_run(folder: Path) -> dict[str, Any]:
    """Return how many files, maps and exact folds were checked, and a paragraph for everything that does not hold.

    Where a file does not hash true, nothing is computed from the others.

    Raises:
        RecipeError: the folder is not a run.
        RotdistillError: its student cannot be opened any more.
    """
    ledger = Ledger(folder.resolve())
    if not ledger.records:
        raise RecipeError(f"{folder}: is not a run: it has no ledger.jsonl with a valid line.")
    store = ArtifactStore(folder.resolve().parent)
    steps = {r["key"]: r for r in ledger.records if r["kind"] == "step"}
    files = {f["path"]: CommittedFile(**f) for r in steps.values() for f in r["files"]}
    files |= {
        r["path"]: CommittedFile(r["path"], r["bytes"], r["sha256"])
        for r in ledger.records
        if r["kind"] == "file"
    }
    problems = [
        f"{store.root / f.path}: does not match its sha256 in the ledger."
        for f in files.values()
        if not store.verify(f)
    ]
    found: dict[str, Any] = {
        "run": folder.name,
        "files": len(files),
        "maps": 0,
        "unfolded": {},
        "problems": problems,
    }
    for record in () if problems else steps.values():
        where = f'step "{record["id"]}"'
        maps = restore_maps(record["info"], store.root) if "spaces" in record["info"] else {}
        found["maps"] += len(maps)
        problems += [
            f"{where}, {space}{fault}" for space, one in maps.items() for fault in _faults(one)
        ]
        if "certificate" in record["report"]:
            resolved = json.loads(
                (store.root / folder.name / "recipe.resolved.json").read_text(encoding="utf-8")
            )
            error, allowed = unfold(
                record, steps, open_model(StudentRef(**resolved["student"])).weights, store.root
            )
            found["unfolded"][record["id"]] = error
            if not error <= allowed:
                problems.append(
                    f"{where}: unfolded, its weights are off by {error:.1e}, more than {allowed:.0e}."
                )
    return found


def _faults(found: Map) -> Iterator[str]:
    """Say where a map is none, or does not lead back."""
    try:
        found.verify(TOLERANCE, "")
    except CheckFailed as problem:
        yield str(problem)
    if found.square or isinstance(
        found, Rotation
    ):  # an assignment between sizes is a record, and loses rows
        size = len(tensor_of(found)) * (found.blocks.shape[-1] if isinstance(found, Gauge) else 1)
        X = torch.randn(8, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        if (
            not (error := float((found.invert().apply(found.apply(X, 1), 1) - X).abs().max()))
            <= 10 * TOLERANCE
        ):
            yield f": there and back again changes rows by {error:.1e}, more than {10 * TOLERANCE:.0e}."


def unfold(
    record: Mapping[str, Any], steps: Mapping[str, Mapping[str, Any]], student: Weights, root: Path
) -> tuple[float, float]:
    """Take back what an exact step stored; return how far that is from the weights before the step, and what its dtype allows.

    The distance is the largest over tensors of `|back - before| / |before|` (Frobenius).
    """
    key = record["before"]
    while key in steps and "tensors" not in steps[key]["info"]:
        key = steps[key]["before"]
    before = restore_weights(steps[key]["info"], student, root) if key in steps else student
    after = restore_weights(record["info"], student, root)
    back = after.unfold(
        restore_undo(
            root / next(f["path"] for f in record["files"] if f["path"].endswith(UNDO)), before
        )
    )
    pairs = [(back[name].double(), before[name].double()) for name in before.entries]
    return max(
        float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs
    ), 100 * torch.finfo(after.dtype).eps
