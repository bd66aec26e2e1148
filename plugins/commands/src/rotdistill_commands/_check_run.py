"""Recompute the claims of a run: its ledger, hashes, maps, and the way back from exact folds.

The models' files are hashed, too, byte by byte: what runs remember of them is not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from rotdistill_commands._run_records import has_documents, run_problems
from rotdistill_core.checkpoint.file_hashes import FileHashes
from rotdistill_core.checkpoint.lazy import open_tensors
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights, restore_undo, restore_weights
from rotdistill_core.errors import CheckFailed, RecipeError, RotdistillError
from rotdistill_core.execution.run_folder import RunFolder
from rotdistill_core.linalg.maps import Gauge, Map, Rotation, restore_maps, tensor_of
from rotdistill_core.planning.models import model_info
from rotdistill_core.recipe.document import ModelRef, StudentRef
from rotdistill_core.store.casts import is_finite
from rotdistill_core.store.ledger import Ledger
from rotdistill_core.store.records import MapsRef, StepRecord, WeightsRef

TOLERANCE = 1e-5
"""Largest error of a map; its way back may be off by ten times as much."""
ROUNDINGS = 100
"""Unfolded weights may be off by this many machine epsilons of their stored dtype."""


@dataclass
class RunCheck:
    """The outcome of a check. Field names are the keys that `rotdistill check --json` prints."""

    run: str
    files: int = 0
    """Committed files that were hashed."""
    models: int = 0
    """Models whose files were hashed."""
    models_not_here: list[str] = field(default_factory=list)
    """A sentence for each model that is not on this machine, so that it was not hashed."""
    maps: int = 0
    unfolded: dict[str, float] = field(default_factory=dict)
    """Id of an exact step -> distance of its unfolded weights from those before it, relative."""
    problems: list[str] = field(default_factory=list)
    """A sentence for everything that is not as the ledger claims."""

    def as_dict(self) -> dict[str, Any]:
        """Return the outcome as JSON values."""
        return asdict(self)


def check_run(folder: Path) -> RunCheck:
    """Check a run. If a file or a record is damaged, nothing is computed from the others.

    Raises:
        RecipeError: the folder is not a run.
        RotdistillError: the student of the run cannot be opened any more.
    """
    folder = folder.resolve()
    run = RunFolder(folder)
    ledger = run.ledger
    if not ledger.records and not ledger.faults and not has_documents(folder):
        raise RecipeError(f"{folder}: is not a run: it has no ledger.jsonl with a valid line.")
    store = run.store
    files = ledger.committed.values()
    check = RunCheck(run=folder.name, files=len(files))
    check.problems += [f"{ledger.path}: {fault}." for fault in ledger.faults]
    not_finite: list[str] = []
    for file in files:
        fault = store.fault_of(file)
        if fault:
            check.problems.append(f"{store.root / file.path}: {fault}.")
        else:
            not_finite += _numbers_that_are_not_finite(store.root / file.path)
    check.problems += run_problems(run)
    damaged = bool(check.problems)
    check.problems += not_finite
    if damaged:
        return check
    found = len(check.problems)
    _check_models(run, check)
    if len(check.problems) > found:  # folds cannot be taken back to another student
        return check
    steps = {record.key: record for record in ledger.steps}
    for record in steps.values():
        try:
            _check_result(record, run, check)
        except (KeyError, TypeError, ValueError, SafetensorError, CheckFailed) as error:
            check.problems.append(
                str(error)
                if isinstance(error, CheckFailed)
                else f'step "{record.id}": its record does not describe its files '
                f"({type(error).__name__}: {error})."
            )
    return check


def _check_result(record: StepRecord, run: RunFolder, check: RunCheck) -> None:
    """Check the maps of a step, and the way back from it if it is exact."""
    if isinstance(record.result, MapsRef):
        _check_maps(record.id, record.result, run.store.root, check)
    if record.report.certificate:
        _check_fold(record, run, check)


def _numbers_that_are_not_finite(path: Path) -> Iterator[str]:
    """Yield a sentence if a file of tensors holds NaN or Inf."""
    if path.suffix != ".safetensors":
        return
    spoilt = [name for name, tensor in open_tensors(path).items() if not is_finite(tensor.read())]
    if spoilt:
        holds = f"and {len(spoilt) - 1} more hold" if len(spoilt) > 1 else "holds"
        yield f"{path}: {spoilt[0]} {holds} NaN or Inf."


def _student(run: RunFolder) -> Weights:
    """Open the student that a run started from."""
    return open_model(StudentRef(**run.recipe["student"])).weights


def _check_models(run: RunFolder, check: RunCheck) -> None:
    """Compare the models with those that the run started from; nothing is downloaded."""
    recorded: dict[str, set[str]] = {}
    newest = {start.key: start for start in run.ledger.starts}
    for start in newest.values():
        for role, sha256 in start.models.items():
            recorded.setdefault(role, set()).add(sha256)
    hashes = FileHashes()
    for role, expected in recorded.items():
        kind = StudentRef if role == "student" else ModelRef
        if not run.recipe.get(role):
            check.problems.append(
                f"{run.ledger.path}: the run started from a {role}, and its recipe has none."
            )
            continue
        ref = kind(**run.recipe[role])
        where = f"{role} {ref.model}"
        try:
            model = model_info(ref, run.path, lambda _: None).model
        except RotdistillError as error:
            if Path(ref.model).expanduser().exists():
                check.problems.append(f"{where}: cannot be opened any more: {error}")
                continue
            model = None
        if model is None:
            check.models_not_here.append(f"{where}: is not on this machine, so it was not hashed.")
            continue
        check.models += 1
        if replace(model, hashes=hashes).sha256 not in expected:
            check.problems.append(
                f"{where}: its files in {model.folder} are not those that the run started from."
            )


def _check_maps(step: str, result: MapsRef, root: Path, check: RunCheck) -> None:
    """Check the maps of one step."""
    maps = restore_maps(result.as_dict(), root)
    check.maps += len(maps)
    for space, found in maps.items():
        check.problems += map_problems(found, f'step "{step}", {space}')


def map_problems(found: Map, where: str) -> Iterator[str]:
    """Yield a sentence if a map is not valid, and one if it does not lead back.

    Args:
        found: the map.
        where: names it in the sentences.
    """
    try:
        found.verify(TOLERANCE, where)
    except CheckFailed as problem:
        yield str(problem)
    # An assignment between spaces of different sizes loses rows, so it has no way back.
    if not found.square and not isinstance(found, Rotation):
        return
    maker = torch.Generator().manual_seed(0)
    X = torch.randn(8, _input_width(found), dtype=torch.float64, generator=maker)
    error = float((found.invert().apply(found.apply(X, 1), 1) - X).abs().max())
    allowed = 10 * TOLERANCE
    if not error <= allowed:  # and not `error > allowed`, which a nan would pass
        yield (
            f"{where}: there and back again changes rows by {error:.1e}, more than {allowed:.0e}."
        )


def _input_width(found: Map) -> int:
    """Return the number of coordinates that a map takes."""
    if isinstance(found, Gauge):
        return len(found.blocks) * found.blocks.shape[-1]
    return len(tensor_of(found))


def _check_fold(record: StepRecord, run: RunFolder, check: RunCheck) -> None:
    """Check the way back from one exact step."""
    error, allowed = unfold_error(record, run.ledger, _student(run), run.store.root)
    check.unfolded[record.id] = error
    if not error <= allowed:
        check.problems.append(
            f'step "{record.id}": unfolded, its weights are off by {error:.1e}, '
            f"more than {allowed:.0e}."
        )


def unfold_error(
    record: StepRecord, ledger: Ledger, student: Weights, root: Path
) -> tuple[float, float]:
    """Undo an exact step, and compare the result with the weights before the step.

    Args:
        record: the step's ledger record.
        ledger: the ledger of the run.
        student: the weights that the run started from.
        root: the folder of runs.

    Returns:
        The largest `|back - before| / |before|` over tensors (Frobenius), and how much of it
        rounding in the stored dtype explains.

    Raises:
        CheckFailed: the step stored no weights, or not how to undo it, or a record is lost.
    """
    after = _stored_weights(record, student, root)
    if after is None:
        raise CheckFailed(f'step "{record.id}" has a certificate but stored no weights.')
    before = _weights_before(record, ledger, student, root)
    back = after.unfold(restore_undo(root / _undo_file(record), before.config, before.adapter))
    errors = []
    for name in before.entries:
        one, two = back[name].double(), before[name].double()
        errors.append(float((one - two).norm() / two.norm().clamp_min(1e-30)))
    return max(errors), ROUNDINGS * torch.finfo(after.dtype).eps


def _undo_file(record: StepRecord) -> str:
    """Return the file that undoes an exact step, relative to the folder of runs."""
    undo = record.result.undo if isinstance(record.result, WeightsRef) else None
    if undo is None:
        raise CheckFailed(
            f'step "{record.id}" has a certificate, but the ledger names no file that undoes it.'
        )
    return undo


def _weights_before(record: StepRecord, ledger: Ledger, student: Weights, root: Path) -> Weights:
    """Return the weights that a step started from: those of the last edit before it.

    Raises:
        CheckFailed: the records do not lead back to a start.
    """
    steps = {each.key: each for each in ledger.steps}
    key = record.before
    while key in steps:
        weights = _stored_weights(steps[key], student, root)
        if weights is not None:
            return weights
        key = steps.pop(key).before  # each once: a record could come after itself
    if key not in {start.key for start in ledger.starts}:
        raise CheckFailed(
            f'step "{record.id}": the record of what it started from is lost, so its way back '
            "cannot be checked."
        )
    return student


def _stored_weights(record: StepRecord, student: Weights, root: Path) -> Weights | None:
    """Return the weights that a step stored; None if it made something else."""
    if not isinstance(record.result, WeightsRef):
        return None
    return restore_weights(record.result.as_dict(), student, root)
