"""A pico workspace: recipes run in its folder, wherever the test stands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.testing import PicoWorkspace

STEPS = """
variants = { base = [], cut = ["chop"] }
step = [
    { use = "residuals" },
    { use = "chop", layers = 1 },
    { use = "fidelity" },
]
"""


@pytest.fixture
def workspace(pico_workspace: PicoWorkspace) -> PicoWorkspace:
    return pico_workspace


def test_a_recipe_runs_in_its_workspace(workspace: PicoWorkspace) -> None:
    here = Path.cwd()
    result = workspace.run(workspace.recipe(STEPS))
    assert Path.cwd() == here
    assert result.folder.parent == workspace.runs
    assert result.checkpoints.keys() == {"base", "cut"}


def test_a_copied_workspace_reuses_its_results(
    make_workspace: Callable[..., PicoWorkspace], tmp_path: Path
) -> None:
    workspace = make_workspace()
    recipe = workspace.recipe(STEPS)
    workspace.run(recipe)
    copy = PicoWorkspace(shutil.copytree(workspace.folder, tmp_path / "copy"))
    again = copy.run(copy.folder / recipe.name)
    made_again = [key for key, step in again.steps.items() if not step.reused]
    assert made_again == []


def test_a_command_line_is_called_in_the_workspace(workspace: PicoWorkspace) -> None:
    recipe = workspace.recipe(STEPS)
    code, out, err = workspace.command("plan", recipe.name)
    assert (code, err) == (0, "")
    assert "residuals" in out


def test_arguments_of_a_recipe_are_written_to_its_head(workspace: PicoWorkspace) -> None:
    teacher = workspace.model("teacher", seed=1)
    path = workspace.recipe(
        STEPS,
        name="named",
        teacher=teacher,
        answer_tokens=7,
        observers=("report",),
        tables="samples.limit = 5",
    )
    recipe = load_recipe(path).recipe
    assert path == workspace.folder / "named.toml"
    assert recipe.name == "named"
    assert recipe.observers == ["report"]
    assert load_recipe(workspace.recipe(STEPS)).recipe.observers == []
    assert (recipe.teacher.model, recipe.student.model) == (str(teacher), "model")
    assert (recipe.samples.answer_tokens, recipe.samples.limit) == (7, 5)


def test_overrides_apply_to_a_run(workspace: PicoWorkspace) -> None:
    recipe = workspace.recipe('step = [{ use = "chop", layers = 1 }]')
    result = workspace.run(recipe, ["chop.layers=2"])
    config = json.loads((result.checkpoints["full"] / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
