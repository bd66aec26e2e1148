"""Runs on disk: which there are, what each consists of, and which of its files other runs need."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from rotdistill_core.errors import CheckFailed, RecipeError, suggest
from rotdistill_core.evaluation.rows import MetricRow, row_from_json
from rotdistill_core.store.files import CommittedFile
from rotdistill_core.store.layout import RunLayout, ledger_paths
from rotdistill_core.store.ledger import ArtifactStore, Ledger
from rotdistill_core.store.plain import COLLECTION_BYTES, read_bytes
from rotdistill_core.store.presence import REMOVING, RUNNING, others_at_work
from rotdistill_core.store.records import (
    CheckpointRecord,
    FailureRecord,
    FileRecord,
    LedgerRecord,
    ParityRecord,
    StartRecord,
    StepRecord,
)

DOCUMENTS = (
    RunLayout.RECIPE,
    RunLayout.RESOLVED_RECIPE,
    RunLayout.TEXTS,
    RunLayout.SYSTEM_PROMPT,
)
"""The files that a run writes before its first step, whatever comes of it."""


@dataclass(frozen=True)
class RunFolder:
    """One run on disk."""

    path: Path

    @property
    def layout(self) -> RunLayout:
        """The names of its files."""
        return RunLayout(self.path)

    @cached_property
    def ledger(self) -> Ledger:
        """Its ledger."""
        return Ledger(self.path)

    @cached_property
    def store(self) -> ArtifactStore:
        """The folder of all runs; it verifies files."""
        return ArtifactStore(self.path.resolve().parent)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe; empty if the run has none, or has lost it.

        Raises:
            CheckFailed: the file is not what was committed.
        """
        content = self.read(RunLayout.RESOLVED_RECIPE)
        recipe: dict[str, Any] = json.loads(content) if content else {}
        return recipe

    @property
    def state(self) -> str:
        """How far the run is.

        `running`, if a process carries out its recipe at this moment; `done`; `unfinished`; `kept
        files`, if only files are left that other runs need; or `copy of` another run, if somebody
        copied the folder.
        """
        if self._owner:
            return f"copy of {self._owner}"
        if self.runners:
            return "running"
        root = self.path.parent
        names = {record.name for record in self.ledger.files if (root / record.path).is_file()}
        if RunLayout.RESULTS in names:
            return "done"
        return "unfinished" if RunLayout.RESOLVED_RECIPE in names else "kept files"

    @property
    def runners(self) -> list[str]:
        """The processes that carry out its recipe at this moment, in words."""
        return others_at_work(self.path, RUNNING)

    @property
    def _owner(self) -> str:
        """The runs that this folder is a copy of; empty if it is none."""
        owners = {record.path.partition("/")[0] for record in self.ledger.files}
        copied = owners and self.path.resolve().name not in owners
        return ", ".join(sorted(owners)) if copied else ""

    @property
    def is_copy(self) -> bool:
        """Whether somebody copied the folder of another run to here."""
        return bool(self._owner)

    @property
    def failures(self) -> list[FailureRecord]:
        """For each variant and step that raised and was not made since: how it failed last.

        Raises:
            CheckFailed: the recipe is not what was committed.
        """
        chains, place = self.chains(), {id(each): i for i, each in enumerate(self.ledger.records)}
        newest = {(record.variant, record.id): record for record in self.ledger.failures}
        made = {
            (variant, step): place[id(record)]
            for variant, chain in chains.items()
            for step, record in chain.items()
        }
        return [each for key, each in newest.items() if made.get(key, -1) < place[id(each)]]

    @property
    def damage(self) -> list[str]:
        """What is wrong with the documents that the run is described by, a sentence each."""
        problems = [f"{self.ledger.path}: {fault}." for fault in self.ledger.faults]
        for read in (lambda: self.recipe, self.rows):
            try:
                read()
            except CheckFailed as error:
                problems.append(str(error))
        return problems

    def local(self, file: CommittedFile) -> CommittedFile:
        """Return where a committed file lies: in a copied folder, the copy of it."""
        owner, _, inside = file.path.partition("/")
        if owner != self._owner:
            return file
        return replace(file, path=f"{self.path.resolve().name}/{inside}")

    def read(self, name: str) -> bytes | None:
        """Return the newest document of a name; None if none is committed, or it is gone.

        Raises:
            CheckFailed: its bytes are not those that were committed.
        """
        record = self.ledger.named(name)
        if record is None:
            return None
        file = self.local(record.file)
        if not os.path.lexists(self.store.root / file.path):
            return None
        return read_bytes(self.store.require(file), COLLECTION_BYTES)

    @property
    def checkpoints(self) -> dict[str, CheckpointRecord]:
        """The newest checkpoint of each variant."""
        return {
            record.variant: replace(
                record,
                folder=self.local(CommittedFile(record.folder, 0, "")).path,
                files=tuple(map(self.local, record.files)),
            )
            for record in self.ledger.checkpoints
        }

    def folder_of(self, record: CheckpointRecord) -> Path:
        """Return where one of `checkpoints` lies."""
        return self.path.parent / record.folder

    def require_checkpoint(self, variant: str) -> Path:
        """Return the folder of a variant's newest checkpoint, if all its files hash true.

        Raises:
            CheckFailed: a file does not.
        """
        record = self.checkpoints[variant]
        self.store.require_checkpoint(record)
        return self.folder_of(record)

    @property
    def bytes(self) -> int:
        """Size of everything in the folder."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    @property
    def changed(self) -> str:
        """When something was last committed, in local time."""
        seconds = self.ledger.path.stat().st_mtime
        return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "minutes")[:16]

    def owns(self, path: str) -> bool:
        """Return whether a path, relative to the folder of runs, lies in this run's folder."""
        return path.startswith(f"{self.path.name}/")

    def rows(self) -> list[MetricRow]:
        """Return the rows of the newest finished run of this recipe; none before.

        Raises:
            CheckFailed: the file is not what was committed.
        """
        content = self.read(RunLayout.RESULTS) or b""
        return [row_from_json(json.loads(line)) for line in content.splitlines()]

    def chains(self) -> dict[str, dict[str, StepRecord]]:
        """Return variant -> step id -> newest record, as far as each variant came."""
        variants: dict[str, list[str]] = self.recipe.get("variants", {})
        made = {record.id for record in self.ledger.steps}
        listed = [step["id"] for step in self.recipe.get("step", []) if step["id"] in made]
        # Evaluators come last, wherever the recipe lists them.
        scored = {record.id for record in self.ledger.steps if record.variant}
        steps = sorted(listed, key=scored.__contains__)
        toggled = {step for names in variants.values() for step in names}
        return {
            variant: self._chain(variant, [s for s in steps if s not in toggled or s in names])
            for variant, names in variants.items()
        }

    def _chain(self, variant: str, steps: list[str]) -> dict[str, StepRecord]:
        """Follow the keys of a variant from step to step.

        A record holds the key of the state that it was made from. The recipe may have been run
        with other inputs, so the first step may have several records. The longest chain wins, then
        the newest.
        """
        newest_first = [r for r in self.ledger.steps[::-1] if r.variant in ("", variant)]
        longest: dict[str, StepRecord] = {}
        for first in [record for record in newest_first if record.id in steps[:1]]:
            chain, key = {first.id: first}, first.key
            for step in steps[1:]:
                records = [record for record in newest_first if record.id == step]
                after = next((record for record in records if record.before == key), None)
                if after:
                    key = after.key
                else:  # an evaluator follows a checkpoint, whose key is not in the chain
                    after = next((record for record in records if record.variant), None)
                if after:
                    chain[step] = after
            longest = max(longest, chain, key=len)
        return longest


def all_runs(root: Path) -> list[RunFolder]:
    """Return every run in a folder, the newest first."""
    paths = sorted(ledger_paths(root), key=lambda path: path.stat().st_mtime, reverse=True)
    return [RunFolder(path.parent) for path in paths]


def find_run(name: str, root: Path, log: Callable[[str], None] | None = None) -> RunFolder:
    """Return the run called `name`.

    A run goes by its folder, by its name in `root`, by the name of its recipe, or by the beginning
    of a name that no other run has.

    Args:
        name: what the user wrote.
        root: the folder of runs.
        log: if given, the name of a recipe that was run several times is enough. It stands for the
            newest finished run, or else the newest; one line says which.

    Raises:
        RecipeError: no run goes by that name, or several do.
    """
    if RunLayout(Path(name)).ledger.is_file():
        return RunFolder(Path(name))
    runs = {run.path.name: run for run in all_runs(root)}
    if name in runs:
        return runs[name]
    names = [each for each in runs if each.startswith(name)]
    if not names:
        hint = suggest(name, runs) or f" `rotdistill runs` lists those in {root}/."
        raise RecipeError(f'there is no run "{name}".{hint}')
    # The whole name of a recipe is not meant as the beginning of another recipe's.
    own = [each for each in names if re.fullmatch("-[0-9a-f]{8}", each.removeprefix(name))]
    names = own or names
    if len(names) == 1:
        return runs[names[0]]
    if log and own:
        run = next((runs[each] for each in names if runs[each].state == "done"), runs[names[0]])
        log(
            f"{run.path.name}, {run.state}, of {run.changed}: "
            f"the newest of {len(names)} runs called {name}"
        )
        return run
    listed = ", ".join(f"{each} (of {runs[each].changed})" for each in names)
    raise RecipeError(
        f'"{name}" is the beginning of {len(names)} runs, the newest first: {listed}. '
        "Write one of these names."
    )


def remove_if_nothing_was_made(folder: Path) -> None:
    """Remove the folder of a run that was refused before anything came of it.

    It then holds the recipe and the texts at most, which the next run writes again, and would stand
    among the runs as an unfinished one. Where a step began and failed, the ledger says so, and the
    folder stays. Files that no ledger names stay, and so does all of it while another process is at
    work there, or if the disk refuses.
    """
    if others_at_work(folder, RUNNING) or others_at_work(folder, REMOVING):
        return
    ledger = Ledger(folder)
    if ledger.faults or not all(map(_is_made_anew, ledger.records)):
        return
    with suppress(OSError):
        for record in ledger.files:
            (folder.parent / record.path).unlink(missing_ok=True)
        ledger.path.unlink(missing_ok=True)
        folder.rmdir()


def _is_made_anew(record: LedgerRecord) -> bool:
    """Return whether every run makes what a record stands for, without work worth keeping."""
    if isinstance(record, FileRecord):
        return record.name in DOCUMENTS
    return isinstance(record, StartRecord | ParityRecord)


def needed_by(run: RunFolder, others: Iterable[RunFolder]) -> dict[str, list[str]]:
    """Return each file of a run that results of other runs consist of, with those runs' names."""
    users: dict[str, list[str]] = {}
    for other in others:
        if other.path.resolve() == run.path.resolve():
            continue
        paths = {path for record in other.ledger.steps for path in record.paths()}
        paths |= {path for record in other.ledger.checkpoints for path in record.paths()}
        for path in filter(run.owns, paths):
            users.setdefault(path, []).append(other.path.name)
    return users
