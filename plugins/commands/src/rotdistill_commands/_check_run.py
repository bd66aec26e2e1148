"""Recompute from disk what a run claims: hashes, that its maps are maps and lead back, that its exact folds can be taken back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights, restore_undo, restore_weights
from rotdistill_core.errors import CheckFailed, RecipeError
from rotdistill_core.linalg.maps import Gauge, Map, Maps, Rotation, restore_maps, tensor_of
from rotdistill_core.recipe.document import StudentRef
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.ledger import ArtifactStore, Ledger
from rotdistill_core.store.records import MapsRef, StepRecord, WeightsRef

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
    steps = {record.key: record for record in ledger.steps}
    checkpoints = {record.key: record for record in ledger.checkpoints}
    files = {file.path: file for record in steps.values() for file in record.files}
    files |= {file.path: file for record in checkpoints.values() for file in record.files}
    files |= {record.path: record.file for record in ledger.files}
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
        where = f'step "{record.id}"'
        result = record.result
        maps = restore_maps(result.as_dict(), store.root) if isinstance(result, MapsRef) else Maps()
        found["maps"] += len(maps)
        problems += [
            f"{where}, {space}{fault}" for space, one in maps.items() for fault in _faults(one)
        ]
        if record.report.certificate:
            resolved = json.loads(
                (store.root / folder.name / "recipe.resolved.json").read_text(encoding="utf-8")
            )
            error, allowed = unfold(
                record, steps, open_model(StudentRef(**resolved["student"])).weights, store.root
            )
            found["unfolded"][record.id] = error
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
    record: StepRecord, steps: Mapping[str, StepRecord], student: Weights, root: Path
) -> tuple[float, float]:
    """Take back what an exact step stored; return how far that is from the weights before the step, and what its dtype allows.

    The distance is the largest over tensors of `|back - before| / |before|` (Frobenius).
    """
    key = record.before
    while key in steps and not isinstance(steps[key].result, WeightsRef):
        key = steps[key].before
    before = _weights_after(steps[key], student, root) if key in steps else student
    after = _weights_after(record, student, root)
    back = after.unfold(
        restore_undo(
            root / next(f.path for f in record.files if f.path.endswith(RunLayout.UNDO)), before
        )
    )
    pairs = [(back[name].double(), before[name].double()) for name in before.entries]
    return max(
        float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs
    ), 100 * torch.finfo(after.dtype).eps


def _weights_after(record: StepRecord, student: Weights, root: Path) -> Weights:
    """Return the weights that a step stored."""
    if not isinstance(record.result, WeightsRef):
        raise CheckFailed(f'step "{record.id}" has a certificate but stored no weights.')
    return restore_weights(record.result.as_dict(), student, root)
