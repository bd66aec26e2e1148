"""Pico runs to break: workspaces made once, their undisturbed runs, comparisons with those."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path

from rotdistill_core.planning.calibration import FIXED, VARIABLE
from rotdistill_core.store.hashing import sha256_of
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.ledger import Ledger
from rotdistill_core.store.records import FileRecord, LedgerRecord, record_as_json
from rotdistill_core.testing import PicoWorkspace, command_line
from tests.faults.child import Ended, call
from tests.warm import keep_to_one_thread, warm_up

SMALL = """
variants = { base = [], full = ["basis", "fold"] }
check.logits_float32 = 1e-2
step = [
    { use = "chop", layers = 2 },
    { use = "residuals" },
    { id = "basis", use = "procrustes" },
    { id = "fold", use = "basis-fold" },
    { use = "fidelity" },
]
"""
"""Five steps: the shortest run that has shards, maps, an exact fold and scores."""
WHOLE = """
variants = { base = [], full = ["basis", "fold", "refit", "head", "lesson"] }
check.logits_float32 = 1e-2
step = [
    { use = "chop", layers = 2 },
    { use = "residuals" },
    { id = "basis", use = "procrustes" },
    { id = "fold", use = "basis-fold" },
    { id = "refit", use = "writer-refit" },
    { id = "head", use = "lm-head-ridge" },
    { id = "lesson", use = "prompt-kl", rank = 2, max_epochs = 1, max_new_tokens = 2 },
    { use = "fidelity" },
    { use = "answers" },
]
"""
"""Every kind of step."""
LIGHT = """
variants = { base = [] }
step = [{ use = "chop", layers = 2 }, { use = "residuals" }, { use = "fidelity" }]
"""
"""The least that opens models, reads texts, lets the teacher answer, captures and scores."""
RECIPES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "light": (LIGHT, ()),
    "small": (SMALL, ()),
    "whole": (WHOLE, ()),
    "reported": (SMALL, ("report",)),
}
"""Name -> steps and observers."""


@dataclass(frozen=True)
class State:
    """All that a run left: the hash of each file, and what the ledger commits."""

    files: Mapping[str, str]
    records: frozenset[str]

    def differences(self, other: State) -> list[str]:
        """Return what another state has otherwise, a line for each difference."""
        lines = []
        for name in sorted({*self.files, *other.files}):
            if name not in other.files:
                lines.append(f"{name} is missing")
            elif name not in self.files:
                lines.append(f"{name} is there besides")
            elif self.files[name] != other.files[name]:
                lines.append(f"{name} has other bytes")
        lines += [f"not in the ledger: {one[:160]}" for one in self.records - other.records]
        lines += [f"in the ledger besides: {one[:160]}" for one in other.records - self.records]
        return lines


def state_of(folder: Path) -> State:
    """Return the state of the runs in a folder."""
    files: dict[str, str] = {}
    records: set[str] = set()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if path.name == RunLayout.LEDGER:
            files[name] = "ledger"
            records |= {
                content for record in Ledger(path.parent).records for content in _contents(record)
            }
        else:
            files[name] = sha256_of(path) if path.is_file() else "no file"
    return State(files, frozenset(records))


def _contents(record: LedgerRecord) -> Iterator[str]:
    """Yield what a record says: itself, and the files that it commits.

    A step that is made again may list its files in another order, and the line of a file only
    saves work where the line of a step commits the same file.
    """
    values = record_as_json(record)
    if values["kind"] in ("removal", "failure"):
        return  # it tells of what was there, or failed, and commits nothing
    files = [values] if isinstance(record, FileRecord) else values.get("files", [])
    named = {file["path"]: f"{file['bytes']} {file['sha256']}" for file in files}
    yield from (f"{path} {rest}" for path, rest in named.items())
    if not isinstance(record, FileRecord):
        yield json.dumps({**values, "files": named}, sort_keys=True)


@dataclass(frozen=True)
class Undisturbed:
    """A workspace whose recipe has run, to be copied."""

    name: str
    folder: Path
    """With `model/`, `texts/`, `trial.toml` and `runs/`."""
    state: State
    seconds: float
    """How long the run took."""
    run: str
    """The name of its run."""

    def copy(self, to: Path, runs: bool = False) -> Path:
        """Copy the workspace, with or without its runs."""
        to.mkdir(parents=True)
        for path in self.folder.iterdir():
            if path.name == "runs" and not runs:
                continue
            if path.is_dir():
                shutil.copytree(path, to / path.name)
            else:
                shutil.copy2(path, to / path.name)
        return to


@dataclass
class Workshop:
    """The workspaces of all cases, in one folder."""

    folder: Path
    made: dict[str, Undisturbed] = field(default_factory=dict)

    def undisturbed(self, name: str) -> Undisturbed:
        """Return a workspace whose recipe has run undisturbed.

        Raises:
            RuntimeError: it did not end with 0.
        """
        if name not in self.made:
            steps, observers = RECIPES[name]
            folder = self.folder / f"undisturbed-{name}"
            make_workspace(folder, steps, observers)
            ended = call(folder, "run", "trial.toml", "--no-plan")
            if ended.code:
                raise RuntimeError(f"the undisturbed run {name} ended {ended.code}: {ended.text}")
            runs = folder / "runs"
            run = next(runs.iterdir()).name
            self.made[name] = Undisturbed(name, folder, state_of(runs), ended.seconds, run)
        return self.made[name]


def make_workspace(folder: Path, steps: str = SMALL, observers: tuple[str, ...] = ()) -> Path:
    """Write a pico model, texts and the recipe `trial.toml`; return the folder."""
    workspace = PicoWorkspace(folder)
    workspace.texts(blurbs=8, questions=2)
    workspace.model(num_hidden_layers=3)
    workspace.recipe(steps, answer_tokens=2, observers=observers)
    return folder


def warm_up_in(folder: Path) -> None:
    """Load what every child needs, so that it is not loaded in each of them."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    os.environ[VARIABLE] = FIXED
    keep_to_one_thread()
    make_workspace(folder / "warm", WHOLE, ("report",))
    with chdir(folder / "warm"):
        warm_up(_call_verbs)


def _call_verbs() -> None:
    for words in (("plan", "trial.toml"), ("run", "trial.toml"), ("check", "trial")):
        code, out, err = command_line(*words)
        if code:
            raise RuntimeError(f"{words} ended {code} while warming up: {out}{err}")


def says(ended: Ended, *parts: str) -> bool:
    """Return whether a call printed all the parts."""
    return all(part in ended.text for part in parts)
