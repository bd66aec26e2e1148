"""Driver of the crash test of lessons: kills a pico run while the teacher writes them.

    python -m tests.execution.crash_lessons WORK_FOLDER PROMPT...

Prints one JSON document: for an undisturbed run the prompts in the order in which the teacher reads
them, and the hashes of all its files; for each kill, before the prompt of a number, the prompts
before and after it, and the hashes of the run that went on.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

from rotdistill_core.execution import lessons
from rotdistill_core.testing import PicoWorkspace
from rotdistill_core.testing.runs import run_recipe
from tests.execution.crash_answers import CHUNK, hashes, outcome
from tests.warm import keep_to_one_thread, warm_up

FORMS = "language\tform\nen\tw1 {topic} w2\nen\tw3 w4 {topic}\n"
QUESTIONS = 4
STEPS = """
variants = { base = [] }
step = [{ use = "chop", layers = 2 }]
"""
TABLES = 'lessons = { count = 12, tokens = 6, forms = "forms.tsv", general = 0.5 }'


def main() -> None:
    keep_to_one_thread()
    work = Path(sys.argv[1])
    model = PicoWorkspace(work).model(num_hidden_layers=3)
    lessons.LESSONS_PER_BLOCK = CHUNK

    def recipe_in(name: str) -> Path:
        workspace = PicoWorkspace(work / name)
        workspace.texts(blurbs=10, questions=QUESTIONS)
        (workspace.folder / "forms.tsv").write_text(FORMS, encoding="utf-8")
        return workspace.recipe(STEPS, teacher=model, student=model, tables=TABLES)

    warm_up(partial(run_recipe, recipe_in("warm")))
    golden = recipe_in("golden")
    undisturbed = {**outcome(golden), "files": hashes(golden.parent)}
    kills = []
    for kill_at in map(int, sys.argv[2:]):
        recipe = recipe_in(f"kill-{kill_at}")
        killed = outcome(recipe, kill_at)
        again = outcome(recipe)
        kills.append({"killed": killed, "again": again, "files": hashes(recipe.parent)})
    print(json.dumps({"undisturbed": undisturbed, "kills": kills}))


if __name__ == "__main__":
    main()
