"""Another aligner by editing one word of the shipped recipe."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.testing import PicoWorkspace, save_folder, scramble

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SMALL = [
    "chop.layers=4",
    "samples.answer_tokens=4",
    "samples.own_answers=0",
    "check.logits_float32=1e-2",
    "observers=[]",
]
FILES = {"index": "index.tsv", "style": "style.md", "heldout": "heldout.tsv", "guard": "guard.tsv"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> PicoWorkspace:
    """Return a workspace with a model and the same model in another basis. Its runs share the steps
    that do not depend on the aligner."""
    workspace = PicoWorkspace(tmp_path_factory.mktemp("swap"))
    workspace.texts()
    folder = workspace.model(num_hidden_layers=5, hidden_size=16)
    model = open_model(ModelRef(model=str(folder)))
    save_folder(scramble(model.weights, 3)[0], folder, workspace.folder / "scrambled")
    return workspace


def write_recipe(folder: Path, use: str) -> Path:
    """Copy the shipped recipe and edit the one word."""
    text = (RECIPES / "swap_aligner.toml").read_text(encoding="utf-8")
    assert text.count('use = "cca"') == 1
    path = folder / "swap_aligner.toml"
    path.write_text(text.replace('use = "cca"', f'use = "{use}"'), encoding="utf-8")
    shutil.copy(RECIPES / "tour_guide.toml", folder)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("student", ["model", "scrambled"])
@pytest.mark.parametrize("use", ["procrustes", "cca", "weight-matching"])
def test_one_word_swaps_the_aligner(workspace: PicoWorkspace, use: str, student: str) -> None:
    recipe = write_recipe(workspace.folder, use)
    assert [each.step.use for each in load_recipe(recipe).steps if each.id == "basis"] == [use]
    texts = [f"samples.{key}={workspace.folder / 'texts' / name}" for key, name in FILES.items()]
    models = ["teacher.model=model", f"student.model={student}"]
    outcome = workspace.run(recipe, [*SMALL, *models, *texts])
    assert outcome.steps["rotated", "fold"].report.certificate.logits_float64 <= 1e-9
    found = {
        (row.variant, row.metric): row.value
        for row in outcome.rows
        if row.layer is None and row.language is None
    }
    assert found["rotated", "kl"] == pytest.approx(found["base", "kl"], rel=1e-4, abs=1e-6)
    assert found["full", "kl"] < found["base", "kl"]
