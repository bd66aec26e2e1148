"""Driver of the crash test: runs a pico recipe in forked children and kills them at chosen writes.

    python tests/execution/crash.py WORK_FOLDER

Prints one JSON document: the hashes of the checkpoints of an undisturbed run, and for each kill the
stage that it hit and whether the next run reached the same hashes. There is one thread and no
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
from itertools import count
from pathlib import Path

import torch

from rotdistill_core import hookimpl
from rotdistill_core.execution.executor import Executor
from rotdistill_core.plugin.source_code import source_digest
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.store import files
from rotdistill_core.store.hashing import sha256_of
from rotdistill_core.store.ledger import ArtifactStore
from rotdistill_core.testing import PicoWorkspace

torch.set_num_threads(1)

KILLS_PER_STAGE = 3
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


def hashes(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): sha256_of(p)
        for p in sorted(root.glob("*/checkpoints/*/*.safetensors"))
    }


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
    calls = count()

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
    golden, steps = hashes(work / "golden"), solved(work / "golden")
    moments: dict[str, list[int]] = defaultdict(list)
    for number, stage in enumerate(log.read_text().splitlines()):
        moments[stage].append(number)
    picker = random.Random(7)
    kills = []
    for stage, numbers in moments.items():
        for number in picker.sample(numbers, min(KILLS_PER_STAGE, len(numbers))):
            root = work / f"kill-{number}"
            killed = forked(partial(carry_out, work, root, killer(number)))
            again = forked(partial(carry_out, work, root, quietly))
            kills.append(
                {
                    "stage": stage,
                    "killed": killed,
                    "again": again,
                    "same": hashes(root) == golden,
                    "steps": solved(root),
                }
            )
    print(json.dumps({"code": code, "golden": golden, "steps": steps, "kills": kills}))


if __name__ == "__main__":
    main()
