"""Driver of the crash test: runs a pico recipe in forked children and kills them at chosen writes.

    python tests/execution/crash.py WORK_FOLDER

Prints one JSON document: the hashes of all files of an undisturbed run, and for each kill the stage
that it hit and in which files the next run differs from it. Two files hold measured times: of the
ledger what its lines commit counts, of the results all but seconds. There is one thread and no
parallel code before the forks, so forking a process that has imported torch is safe.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import count as counter
from pathlib import Path

import torch

from rotdistill_core import hookimpl
from rotdistill_core.execution.executor import Executor
from rotdistill_core.plugin.source_code import source_digest
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.store import files
from rotdistill_core.store.hashing import digest, sha256_of
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.ledger import ArtifactStore, Ledger
from rotdistill_core.testing import PicoWorkspace

torch.set_num_threads(1)

KILLS_PER_STAGE = 3
EVERY_KILL = ("before the steps",)
"""Stages in which documents follow each other: a kill at each write."""
STEPS = """
variants = { base = [], full = ["basis", "fold", "refit", "head"] }
check.logits_float32 = 1e-2
step = [
    { use = "chop", layers = 3 },
    { use = "residuals" },
    { id = "basis", use = "procrustes" },
    { id = "fold", use = "basis-fold" },
    { id = "refit", use = "writer-refit" },
    { id = "head", use = "lm-head-ridge" },
    { use = "fidelity" },
]
"""


class Observer:
    """Knows which step is running."""

    stage = "before the steps"

    def log(self, text: str) -> None:
        """Keep quiet."""

    @hookimpl
    def before_step(self, step_id: str, variant: str) -> None:
        self.stage = step_id

    @hookimpl
    def after_step(self, step_id: str, variant: str, seconds: float, reused: bool) -> None:
        self.stage = "saving"


def carry_out(work: Path, root: Path, at_sync: Callable[[str], None]) -> None:
    observer, plain = Observer(), os.fsync

    def fsync(handle: int) -> None:
        at_sync(observer.stage)
        plain(handle)

    files.os.fsync = fsync
    Executor(load_recipe(work / "crash.toml"), root, observer, lambda *_: None).go()


def quietly(stage: str) -> None:
    """Let a write pass."""


def note(log: Path, stage: str) -> None:
    """Write down the stage of a write."""
    with log.open("a") as stream:
        stream.write(stage + "\n")


def forked(action: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def contents(root: Path) -> dict[str, str]:
    """Return path -> hash of every file of the runs in a folder."""
    paths = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {str(path.relative_to(root)): content_of(path) for path in paths}


def content_of(path: Path) -> str:
    """Return the hash of a file's content, without what differs from run to run."""
    if path.name == RunLayout.LEDGER:
        ledger = Ledger(path.parent)
        committed = {path: file.sha256 for path, file in ledger.committed.items()}
        committed = {path: sha for path, sha in committed.items() if RunLayout.RESULTS not in path}
        steps = sorted([record.key, record.id, record.variant] for record in ledger.steps)
        saved = sorted([record.key, record.variant] for record in ledger.checkpoints)
        return digest(committed, steps, saved, list(map(str, ledger.faults)))
    if path.name == RunLayout.RESULTS:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return digest([row for row in rows if row["metric"] != "seconds"])
    return sha256_of(path)


def differences(root: Path, golden: dict[str, str]) -> list[str]:
    """Return the files that are missing, that nobody expects, or that have other bytes."""
    found = contents(root)
    return sorted(
        name for name in found.keys() | golden.keys() if found.get(name) != golden.get(name)
    )


def solved(root: Path) -> int:
    """Return how many results all runs have committed."""
    ledgers = ArtifactStore(root).ledgers()
    return sum(len(ledger.steps) + len(ledger.checkpoints) for ledger in ledgers)


def warm_up(recipe: Path) -> None:
    """Load what every child needs, so that it is not loaded in each of them: the methods of the
    steps, and what their keys need of the code."""
    for recipe_step in load_recipe(recipe).steps:
        package = recipe_step.origin.target.partition(".")[0]
        importlib.import_module(f"{package}._method")
        source_digest(recipe_step.origin)


def killer(number: int) -> Callable[[str], None]:
    """Return a function that kills the process when it is called for the n-th time, from 0."""
    calls = counter()

    def kill(stage: str) -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


def main() -> None:
    work = Path(sys.argv[1])
    workspace = PicoWorkspace(work)
    workspace.texts()
    model = workspace.model(num_hidden_layers=5)
    warm_up(workspace.recipe(STEPS, name="crash", teacher=model, student=model))
    log = work / "syncs"
    code = forked(partial(carry_out, work, work / "golden", partial(note, log)))
    golden, steps = contents(work / "golden"), solved(work / "golden")
    moments: dict[str, list[int]] = defaultdict(list)
    for number, stage in enumerate(log.read_text().splitlines()):
        moments[stage].append(number)
    picker = random.Random(7)
    kills = []
    for stage, numbers in moments.items():
        count = len(numbers) if stage in EVERY_KILL else min(KILLS_PER_STAGE, len(numbers))
        for number in picker.sample(numbers, count):
            root = work / f"kill-{number}"
            killed = forked(partial(carry_out, work, root, killer(number)))
            again = forked(partial(carry_out, work, root, quietly))
            kills.append(
                {
                    "stage": stage,
                    "killed": killed,
                    "again": again,
                    "differences": differences(root, golden),
                    "steps": solved(root),
                }
            )
    print(json.dumps({"code": code, "golden": golden, "steps": steps, "kills": kills}))


if __name__ == "__main__":
    main()
