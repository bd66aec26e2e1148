"""Driver of the crash test: runs a pico recipe in forked children and kills them at chosen writes.

    python tests/crash.py WORK_FOLDER

Prints one JSON document: golden checkpoint hashes, and for each kill the stage it hit and whether the next run reached them.
One thread and no parallel code before the forks, so that forking a process that has imported torch is safe.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from rotdistill_core.execution.executor import Executor
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.store.hashing import sha256_of
from rotdistill_core.store.ledger import ArtifactStore

torch.set_num_threads(1)

from rotdistill_core.plugin.markers import hookimpl  # noqa: E402
from rotdistill_core.store import files as ledger
from rotdistill_core.testing import pico_folder, pico_head, pico_texts  # noqa: E402

KILLS_PER_STAGE = 3
RECIPE = (
    pico_head("crash", "{model}", "{model}")
    + """
[[step]]
use = "chop"
layers = 3
[[step]]
use = "residuals"
[[step]]
id = "basis"
use = "procrustes"
[[step]]
id = "fold"
use = "basis-fold"
[[step]]
id = "refit"
use = "writer-refit"
[[step]]
id = "head"
use = "lm-head-ridge"
[[step]]
use = "fidelity"
[check]
logits_float32 = 1e-2
[variants]
base = []
full = ["basis", "fold", "refit", "head"]
"""
)


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

    ledger.os.fsync = fsync
    Executor(load_recipe(work / "crash.toml"), root, observer, lambda *_: None).go()


def note(log: Path, stage: str) -> None:
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
    return sum(
        1 for book in ArtifactStore(root).ledgers() for r in book.records if r["kind"] == "step"
    )


def main() -> None:
    work = Path(sys.argv[1])
    model = pico_folder(work / "model", num_hidden_layers=5)
    pico_texts(work / "texts")
    (work / "crash.toml").write_text(RECIPE.format(model=model), encoding="utf-8")
    log = work / "syncs"
    code = forked(lambda: carry_out(work, work / "golden", lambda stage: note(log, stage)))
    golden, steps = hashes(work / "golden"), solved(work / "golden")
    moments: dict[str, list[int]] = defaultdict(list)
    for number, stage in enumerate(log.read_text().splitlines()):
        moments[stage].append(number)
    picker, kills = random.Random(7), []
    for stage, numbers in moments.items():
        for number in picker.sample(numbers, min(KILLS_PER_STAGE, len(numbers))):
            root, count = work / f"kill-{number}", iter(range(10**9))
            killed = forked(
                lambda: carry_out(
                    work,
                    root,
                    lambda _: (
                        os.kill(os.getpid(), signal.SIGKILL) if next(count) == number else None
                    ),
                )
            )
            again = forked(lambda: carry_out(work, root, lambda _: None))
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
