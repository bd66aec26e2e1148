"""Driver of crash tests: kills a pico run in the middle of a chunk of answers, and of training.

    python -m tests.execution.crash_answers WORK_FOLDER

Prints one JSON document: for an undisturbed run the prompts in the order in which a model reads
them, and the hashes of all its files; for each kill the prompts before and after it, and the hashes
of the run that went on; and the same for a kill in the middle of training, with the texts of each
step of it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rotdistill_prompt_kl import _training

from rotdistill_core.forward import answers, generate
from rotdistill_core.forward.growth import Growth
from rotdistill_core.store.hashing import digest, sha256_of
from rotdistill_core.testing import PicoWorkspace
from rotdistill_core.testing.runs import run_recipe
from tests.warm import keep_to_one_thread, warm_up

QUESTIONS = 10
AT_ONCE = 2
CHUNK = 4
SERIES = ("held-out questions", "own questions", "places", "answers of base", "answers of taught")
THIRD_OF_SECOND_CHUNK = 6
SECOND_STEP = 1
"""Of training; after the first one the validation KL is measured, and what was learned is saved."""
STEPS = """
variants = { base = [], taught = ["lesson"] }
step = [
    { use = "chop", layers = 2 },
    { id = "lesson", use = "prompt-kl", rank = 2, max_epochs = 1, max_new_tokens = 3 },
    { use = "answers" },
]
"""


def forked(action: Callable[[], None]) -> int:
    """Do something in a process of its own; return its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)  # its pool of threads has to be made anew
            action()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def note_training(log: Path, kill_at: int | None) -> None:
    """Let training note the texts of each step, and die in the step of a number, counted from 0."""
    plain = _training.add_gradients
    trained: list[list[int]] = []

    def noted(*given: Any, **named: Any) -> float:
        if len(trained) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        trained.append(given[3])
        log.write_text(json.dumps(trained))
        return plain(*given, **named)

    _training.add_gradients = noted


def carry_out(recipe: Path, log: Path, kill_at: int | None, kill_training_at: int | None) -> None:
    """Run the recipe in small chunks, note each prompt, and die before the one of a number."""
    note_training(log.with_suffix(".trained"), kill_training_at)
    generate.ANSWERS_PER_CHUNK = CHUNK
    answers.ANSWERS_AT_ONCE = generate.ANSWERS_AT_ONCE = AT_ONCE
    time.monotonic = lambda: 0.0  # what is measured of steps is in results.jsonl
    plain = Growth._read_prompts
    read: list[str] = []

    def noted(growth: Growth, count: int) -> None:
        for each in growth.waiting[:count]:
            read.append(digest(list(each.asked.prompt)))
            log.write_text(json.dumps(read))
            if len(read) - 1 == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        plain(growth, count)

    Growth._read_prompts = noted
    run_recipe(recipe)


def outcome(
    recipe: Path, kill_at: int | None = None, kill_training_at: int | None = None
) -> dict[str, object]:
    """Carry out a recipe in a child process; return how it ended, what was read and trained on."""
    logs = [recipe.with_suffix(ending) for ending in (".read", ".trained")]
    for log in logs:
        log.write_text("[]")
    code = forked(partial(carry_out, recipe, logs[0], kill_at, kill_training_at))
    read, trained = (json.loads(log.read_text()) for log in logs)
    return {"code": code, "read": read, "trained": trained}


def hashes(folder: Path) -> dict[str, str]:
    """Return the hash of every file of the runs in a folder, ledgers too."""
    files = [path for path in sorted((folder / "runs").rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): sha256_of(path) for path in files}


def main() -> None:
    keep_to_one_thread()
    work = Path(sys.argv[1])
    model = PicoWorkspace(work).model(num_hidden_layers=3)

    def recipe_in(name: str, questions: int = QUESTIONS) -> Path:
        workspace = PicoWorkspace(work / name)
        workspace.texts(blurbs=questions, questions=questions)
        tables = "samples.own_answers = 4"
        return workspace.recipe(STEPS, teacher=model, student=model, tables=tables)

    warm_up(partial(run_recipe, recipe_in("warm", questions=4)))
    golden = recipe_in("golden")
    undisturbed = {**outcome(golden), "files": hashes(golden.parent)}
    kills = []
    for number, series in enumerate(SERIES):
        recipe = recipe_in(f"kill-{number}")
        killed = outcome(recipe, number * QUESTIONS + THIRD_OF_SECOND_CHUNK)
        again = outcome(recipe)
        kill = {"series": series, "killed": killed, "again": again, "files": hashes(recipe.parent)}
        kills.append(kill)
    recipe = recipe_in("training")
    killed = outcome(recipe, kill_training_at=SECOND_STEP)
    training = {"killed": killed, "again": outcome(recipe), "files": hashes(recipe.parent)}
    print(json.dumps({"undisturbed": undisturbed, "kills": kills, "training": training}))


if __name__ == "__main__":
    main()
