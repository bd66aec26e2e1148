"""Which results exist already, found by the keys that `run` will look for.

A run records its inputs in its ledger, together with their key. The inputs are hashes that need no
tokenizer and read little of the weights. When a plan finds the same inputs again, the key of every
step follows without opening a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rotdistill_core.execution.keys import KeyedStep, checkpoint_key
from rotdistill_core.plugin.step import options_of
from rotdistill_core.recipe.resolved import RecipeStep
from rotdistill_core.store.files import CommittedFile
from rotdistill_core.store.hashing import sha256_of
from rotdistill_core.store.ledger import Ledger
from rotdistill_core.store.records import CheckpointRecord, StartRecord, StepRecord

UNKNOWN = "?"
"""Key of inputs that no run has had. No result has a key that is derived from it."""


HASHED_BYTES = 1 << 20
"""Bytes of the largest file that a plan hashes."""


class ExistingResult(NamedTuple):
    """A step's result in the folder of runs."""

    run: str
    """Name of the run whose ledger has it."""
    record: StepRecord


@dataclass(frozen=True)
class StepStatus:
    """One result of a run: of a step after certain others, for all variants that share it."""

    recipe_step: RecipeStep
    earlier: tuple[RecipeStep, ...]
    """The steps before it that change weights, maps or captured states."""
    key: str
    existing: ExistingResult | None
    """The result with this key, if there is one."""
    reason: str
    """Why it has to be made; empty if it exists."""
    newest: ExistingResult | None
    """The newest result of a step of this id, whatever its key and its files."""
    variants: list[str] = field(default_factory=list)

    @property
    def measured_seconds(self) -> float | None:
        """Time that this very result took when it was made; None if that was never done.

        With other models or texts a step of the same options takes another time.
        """
        if self.existing:
            return self.existing.record.seconds
        if self.newest and self.newest.record.key == self.key:
            return self.newest.record.seconds
        return None


FRESH = "asked for with --fresh"
"""Why a result is made that exists already."""


def newest_starts(ledgers: Iterable[Ledger], run: str) -> list[StartRecord]:
    """Return what runs have started from: the newest first, those of the run `run` before all."""
    oldest_first = sorted(ledgers, key=lambda ledger: ledger.folder.name == run)
    return [start for ledger in oldest_first for start in ledger.starts][::-1]


class ReuseIndex:
    """All results in the ledgers whose files exist with their length; small ones are hashed."""

    def __init__(self, ledgers: Iterable[Ledger], run: str) -> None:
        """Index ledgers; the results of `run` come before equal ones of other runs."""
        oldest_first = sorted(ledgers, key=lambda ledger: ledger.folder.name == run)
        self.starts = newest_starts(oldest_first, run)
        """What runs have started from, the newest first."""
        self._newest: dict[tuple[str, str], ExistingResult] = {}
        self._results: dict[str, list[tuple[Path, ExistingResult]]] = {}
        self._checkpoints: dict[str, list[tuple[Path, CheckpointRecord]]] = {}
        for ledger in oldest_first:
            name, root = ledger.folder.name, ledger.folder.parent
            for step in ledger.steps:
                result = ExistingResult(name, step)
                self._newest[step.id, step.variant] = result
                self._results.setdefault(step.key, []).append((root, result))
            for checkpoint in ledger.checkpoints:
                self._checkpoints.setdefault(checkpoint.key, []).append((root, checkpoint))

    def start_key(self, inputs: Mapping[str, str] | None) -> str:
        """Return the key of the inputs of a run; `UNKNOWN` if no run has had them, or for None."""
        return next((start.key for start in self.starts if start.inputs == inputs), UNKNOWN)

    def changed_inputs(self, inputs: Mapping[str, str] | None) -> list[str]:
        """Return the names of the inputs that differ from the most similar ones of any run.

        The list is empty if no run has recorded inputs, or for None.
        """
        known = [start.inputs for start in self.starts]
        if inputs is None or not known:
            return []
        nearest = max(known, key=lambda old: _equal_values(old, inputs))
        return [name for name in inputs if nearest.get(name) != inputs[name]]

    def find(self, key: str) -> ExistingResult | None:
        """Return the newest result of a step with a key whose files seem to hold."""
        for root, result in reversed(self._results.get(key, [])):
            if _seem_to_hold(result.record.files, root):
                return result
        return None

    def newest(self, step: str, variant: str = "") -> ExistingResult | None:
        """Return the newest result of a step by its id, of an evaluator for one variant."""
        return self._newest.get((step, variant))

    def has_checkpoint(self, run: str, variant: str, state_key: str, dtype: str) -> bool:
        """Return whether a variant's checkpoint is in the folder of `run`.

        Args:
            run: name of the run. A checkpoint in another run's folder does not count.
            variant: name of the variant.
            state_key: key of its last step before evaluation, or of the start if it has none.
            dtype: name of the dtype of the checkpoint.
        """
        saved = self._checkpoints.get(checkpoint_key(variant, state_key, dtype), [])
        return any(
            record.folder.startswith(f"{run}/") and _seem_to_hold(record.files, root)
            for root, record in saved
        )


def _equal_values(one: Mapping[str, str], two: Mapping[str, str]) -> int:
    return sum(one.get(name) == value for name, value in two.items())


def _seem_to_hold(files: Iterable[CommittedFile], root: Path) -> bool:
    """Return whether files exist with their length, and small ones with their hash.

    A plan is to be quick, so the content of a large file is left to the run.
    """
    for file in files:
        path = root / file.path
        if not path.is_file() or path.stat().st_size != file.bytes:
            return False
        if file.bytes <= HASHED_BYTES and sha256_of(path) != file.sha256:
            return False
    return True


def step_statuses(
    keyed: Iterable[KeyedStep], index: ReuseIndex, changed_inputs: Sequence[str], fresh: bool
) -> list[StepStatus]:
    """Return every result of a run, each once, in the order in which the run needs them.

    Args:
        keyed: all steps of all variants with their keys.
        index: the existing results.
        changed_inputs: names of the inputs that differ from those of earlier runs.
        fresh: reuse nothing.
    """
    start = f"{', '.join(changed_inputs)} changed" if changed_inputs else ""
    # The first thing that has changed for a variant is the reason for all that comes after it.
    causes: dict[str, str] = {}
    statuses: dict[str, StepStatus] = {}
    for entry in keyed:
        cause = causes.get(entry.variant, start)
        status = statuses.get(entry.key)
        if status is None:
            status = statuses[entry.key] = _status(entry, index, cause, fresh)
        status.variants.append(entry.variant)
        if not status.existing and entry.recipe_step.stage != "evaluate":
            causes[entry.variant] = cause or f"depends on {entry.recipe_step.id}"
    return list(statuses.values())


def _status(entry: KeyedStep, index: ReuseIndex, cause: str, fresh: bool) -> StepStatus:
    recipe_step = entry.recipe_step
    is_evaluator = recipe_step.stage == "evaluate"
    newest = index.newest(recipe_step.id, entry.variant if is_evaluator else "")
    existing = None if fresh else index.find(entry.key)
    reason = ""
    if fresh:
        reason = FRESH
    elif not existing:
        reason = _reason(recipe_step, newest, cause)
    return StepStatus(
        recipe_step=recipe_step,
        earlier=entry.earlier,
        key=entry.key,
        existing=existing,
        reason=reason,
        newest=newest,
    )


def _reason(recipe_step: RecipeStep, newest: ExistingResult | None, cause: str) -> str:
    """Return why a step has to be made: what differs in the step itself, else `cause`.

    The run that it is compared with is named: it may be one of another recipe.

    Args:
        recipe_step: the step.
        newest: its newest result.
        cause: the first change before it in its variant; may be empty.
    """
    if newest is None:
        return "not made before"
    record = newest.record
    old, new = record.options, options_of(recipe_step.step)
    changes = [
        f"{option} {old.get(option)} → {new.get(option)}"
        for option in dict.fromkeys([*old, *new])
        if old.get(option) != new.get(option)
    ]
    if changes:
        return f"unlike {newest.run}: {', '.join(changes)}"
    origin = recipe_step.origin
    if record.plugin != origin.release:
        return f"unlike {newest.run}: {record.plugin} → {origin.release}"
    if record.before and recipe_step.key(record.before) != record.key:
        return f"unlike {newest.run}: the code of {origin.distribution}"
    return cause or "its files are gone, or made from something else"


def last_edit(statuses: Sequence[StepStatus], variant: str) -> StepStatus | None:
    """Return the last step of a variant before its evaluators; None if it has none."""
    edits = [status for status in statuses if status.recipe_step.stage != "evaluate"]
    return next((status for status in reversed(edits) if variant in status.variants), None)
