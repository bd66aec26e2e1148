"""Another aligner by editing one word of the shipped recipe."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.execution.executor import Executor
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.testing import SilentObserver, pico_folder, pico_texts, save_folder, scramble

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SMALL = [
    "chop.layers=4",
    "samples.answer_tokens=4",
    "samples.own_answers=0",
    "check.logits_float32=1e-2",
    "observers=[]",
]
FILES = {"index": "index.tsv", "style": "style.md", "heldout": "heldout.tsv", "guard": "guard.tsv"}


def run(work: Path, use: str, student: str) -> tuple[RunResult, Executor]:
    """Edit the one word and run on pico models."""
    text = (RECIPES / "swap_aligner.toml").read_text(encoding="utf-8")
    assert text.count('use = "cca"') == 1
    (work / "swap_aligner.toml").write_text(
        text.replace('use = "cca"', f'use = "{use}"'), encoding="utf-8"
    )
    shutil.copy(RECIPES / "tour_guide.toml", work)
    models = [f"teacher.model={work / 'model'}", f"student.model={work / student}"]
    texts = [f"samples.{key}={work / 'texts' / name}" for key, name in FILES.items()]
    made = Executor(
        load_recipe(work / "swap_aligner.toml", [*SMALL, *models, *texts]),
        work / "runs",
        SilentObserver(),
        lambda *_: None,
    )
    return made.go(), made


@pytest.mark.parametrize("student", ["model", "scrambled"])
@pytest.mark.parametrize("use", ["procrustes", "cca", "weight-matching"])
def test_one_word_swaps_the_aligner(tmp_path: Path, use: str, student: str) -> None:
    pico_folder(tmp_path / "model", num_hidden_layers=5, hidden_size=16)
    pico_texts(tmp_path / "texts")
    model = open_model(ModelRef(model=str(tmp_path / "model")))
    save_folder(scramble(model.weights, 3)[0], model.folder, tmp_path / "scrambled")
    outcome, made = run(tmp_path, use, student)
    assert [
        recipe_step.step.use for recipe_step in made.loaded.steps if recipe_step.id == "basis"
    ] == [use]
    assert outcome.steps["rotated", "fold"].report.certificate.logits_float64 <= 1e-9
    found = {
        (row.variant, row.metric): row.value
        for row in outcome.rows
        if row.layer is None and row.language is None
    }
    assert found["rotated", "kl"] == pytest.approx(found["base", "kl"], rel=1e-4, abs=1e-6)
    assert found["full", "kl"] < found["base", "kl"]
