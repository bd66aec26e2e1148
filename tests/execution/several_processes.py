"""Driver of the tests of runs in several processes: forks them, after one import of torch.

    python -m tests.execution.several_processes WORK_FOLDER CASE...

Carries out a pico recipe once for each case, each time in a folder of its own. A case is a number
of processes, with "moments" for a recipe of sums in place of rows, or with "cut moments" for the
recipe of rows with sums in their place, or it is one of `KILLS`: a
process of two is killed there, and three processes carry the recipe out again. Prints one JSON
document: for each case the exit codes, what was committed before the last start and at the end, at
which boundaries forward passes were taken up in the last start, and the hashes of all files but the
ledger. Seconds that were measured are left out of the results.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import chdir
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rotdistill_residuals import _method
from torch import Tensor

from rotdistill_core.execution.executor import Executor
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.forward.ranks import start_ranks
from rotdistill_core.linalg.moments import Moments
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.store.hashing import digest, sha256_of
from rotdistill_core.store.layout import RunLayout, ledger_paths
from rotdistill_core.store.ledger import AnyRecord, Ledger
from rotdistill_core.store.records import FileRecord
from rotdistill_core.testing import PicoWorkspace
from rotdistill_core.testing.pico import WORDS
from rotdistill_core.testing.runs import SilentObserver, run_recipe
from tests.warm import keep_to_one_thread, warm_up

STARTS = "starts"
"""File of the boundaries at which the first process took up a forward pass; see `note_starts`."""
TEXTS = 240
"""About eight batches."""
FEW_TEXTS = 24
"""What loads all that a run needs."""
STEPS = """
variants = { base = [], full = ["refit"] }
step = [
    { use = "chop", layers = 2 },
    { use = "residuals", student_texts = 60 },
    { id = "refit", use = "writer-refit", writers = ["heads", "neurons"] },
    { use = "fidelity" },
]
"""
MOMENTS = "moments"
STEPS_OF_MOMENTS = """
variants = { base = [], full = ["basis", "fold", "refit", "head"], tuned = ["soup", "lora"] }
step = [
    { use = "residuals", store = "moments" },
    { id = "basis", use = "procrustes" },
    { id = "fold", use = "basis-fold" },
    { id = "refit", use = "writer-refit", writers = ["heads", "neurons"] },
    { id = "head", use = "lm-head-ridge", objective = "kl", max_iter = 2 },
    { id = "soup", use = "soups", ingredients = ["student"], method = "fisher", fisher_texts = 2 },
    { id = "lora", use = "prompt-kl", max_prompts = 16, max_epochs = 1, learning_rate = 0.02, \
on_policy = 0.5 },
    { use = "fidelity" },
]
"""
CUT_OF_MOMENTS = STEPS.replace("student_texts = 60", 'store = "moments"')


def forked(action: Callable[[], None]) -> int:
    """Do something in a process of its own; return its id."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)  # its pool of threads has to be made anew
            action()
        except BaseException as error:
            print(f"{os.environ.get('RANK')}: {error!r}", file=sys.stderr, flush=True)
            os._exit(int(getattr(error, "exit_code", 1)))
        os._exit(0)
    return pid


def die() -> None:
    """End this process as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_second_block() -> None:
    """Die in the middle of the rows of layer 1."""
    plain, added = Moments.add, itertools.count()

    def add(moments: Moments, X: Tensor, Y: Tensor, weights: Tensor | None = None) -> None:
        if next(added) == BATCHES_BEFORE_THE_KILL:
            die()
        plain(moments, X, Y, weights)

    Moments.add = add  # type: ignore[method-assign]


def die_before_second_sum() -> None:
    """Die before the sums of the second writer are added up."""
    plain, combined = Moments.combine, itertools.count()

    def combine(moments: Moments, *arguments: Any) -> None:
        if next(combined) == SUMS_BEFORE_THE_KILL:
            die()
        plain(moments, *arguments)

    Moments.combine = combine  # type: ignore[method-assign]


def die_before_a_line(name: str) -> None:
    """Die when a file lies there and its line does not."""
    plain = Ledger.append

    def append(ledger: Ledger, record: AnyRecord) -> AnyRecord:
        if isinstance(record, FileRecord) and record.name == name:
            die()
        return plain(ledger, record)

    Ledger.append = append  # type: ignore[method-assign]


def note_starts(path: Path) -> None:
    """Add a line to a file for each forward pass that is taken up from states: its boundary."""
    plain = LayerwiseForward.start_at

    def start_at(forward: LayerwiseForward, boundary: int, states: Any) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{boundary}\n")
        plain(forward, boundary, states)

    LayerwiseForward.start_at = start_at  # type: ignore[method-assign]


BATCHES_BEFORE_THE_KILL = 12
SUMS_BEFORE_THE_KILL = 3
KILLS: Mapping[str, tuple[int, Callable[[], None]]] = {
    "block": (1, die_in_second_block),
    "sum": (1, die_before_second_sum),
    "leading block": (0, die_in_second_block),
    "states": (0, partial(die_before_a_line, "shards/teacher/residual/00002.safetensors")),
    "shard": (0, partial(die_before_a_line, "shards/student/residual/00001.safetensors")),
    "writer": (0, partial(die_before_a_line, "weights/refit/layer_00001_heads.safetensors")),
}
"""Where a process is killed -> the number of the process, and what makes it die there."""


def carry_out(
    recipe: Path, number: int, count: int, port: int, plant: Callable[[], None] | None = None
) -> None:
    """Carry out a recipe as one of several processes."""
    if plant:
        plant()
    if number == 0:
        note_starts(recipe.parent / STARTS)
    os.environ |= {
        "RANK": str(number),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ranks = start_ranks()
    with chdir(recipe.parent), ranks.together():
        loaded = load_recipe(recipe)
        Executor(
            loaded, recipe.parent / "runs", SilentObserver(), lambda *_: None, ranks=ranks
        ).go()


def run_in(count: int, recipe: Path, kill: str = "") -> list[int]:
    """Carry out a recipe in so many processes; return their exit codes."""
    doomed, plant = KILLS[kill] if kill else (-1, None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = [
        forked(partial(carry_out, recipe, k, count, port, plant if k == doomed else None))
        for k in range(count)
    ]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def committed(folder: Path) -> list[str]:
    """Return the paths that the ledgers of a folder commit, in order, once for each line."""
    lines = [
        record for path in ledger_paths(folder / "runs") for record in Ledger(path.parent).files
    ]
    return [record.path for record in lines]


def starts(folder: Path) -> list[int]:
    """Return the boundaries that `note_starts` noted, in order."""
    path = folder / STARTS
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def hashes(folder: Path) -> Mapping[str, str]:
    """Return the hash of every file of the runs in a folder, apart from ledgers."""
    files = [path for path in sorted((folder / "runs").rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): _hash(path) for path in files if path.name != "ledger.jsonl"
    }


def _hash(path: Path) -> str:
    if path.name != RunLayout.RESULTS:
        return sha256_of(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return digest([row for row in rows if row["metric"] != "seconds"])


def make_recipe(folder: Path, steps: str, teacher: Path, student: Path, count: int = TEXTS) -> Path:
    """Write texts and a recipe of pico models into a folder; return the recipe."""
    workspace = PicoWorkspace(folder)
    index = workspace.texts()["index.tsv"]
    lines = ["id\tlanguage\tplace\tcountry\tquestion\tblurb"]
    words = random.Random(0)
    for k in range(count):
        question, blurb = words.choices(WORDS, k=8), words.choices(WORDS, k=words.randint(20, 90))
        cells = (f"en-{k}", "en", f"place {k}", "land", " ".join(question), " ".join(blurb))
        lines.append("\t".join(cells))
    index.write_text("\n".join([*lines, ""]), encoding="utf-8")
    tables = 'samples.guard = "texts/guard.tsv"'
    return workspace.recipe(steps, teacher=teacher, student=student, tables=tables)


def main() -> None:
    keep_to_one_thread()
    _method.SAVED_LAYERS = 1  # pico models have few
    work = Path(sys.argv[1])
    model = PicoWorkspace(work).model(num_hidden_layers=3)
    other = PicoWorkspace(work).model("other", seed=1)
    few = [
        make_recipe(work / f"warm-{number}", steps, model, student, FEW_TEXTS)
        for number, (steps, student) in enumerate([(STEPS, model), (STEPS_OF_MOMENTS, other)])
    ]
    warm_up(lambda: list(map(run_recipe, few)))
    outcomes = {}
    for case in sys.argv[2:]:
        steps, student = STEPS, model
        if case.endswith(MOMENTS):
            is_cut = "cut" in case
            steps = CUT_OF_MOMENTS if is_cut else STEPS_OF_MOMENTS
            student = model if is_cut else other
        recipe = make_recipe(work / case, steps, model, student)
        codes = [run_in(2, recipe, case)] if case in KILLS else []
        before = committed(recipe.parent)
        (recipe.parent / STARTS).unlink(missing_ok=True)
        codes.append(run_in(3 if case in KILLS else int(case.split()[0]), recipe))
        outcomes[case] = {
            "codes": codes,
            "before": before,
            "committed": committed(recipe.parent),
            "starts": starts(recipe.parent),
            "files": hashes(recipe.parent),
        }
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
