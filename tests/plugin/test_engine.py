"""An engine is found by the table `[engine]`, like a step by its `use`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from rotdistill_core.errors import PluginError, RecipeError
from rotdistill_core.forward.engine import Transformers
from rotdistill_core.plugin.engine import engine, settings_of
from rotdistill_core.plugin.registry import ENGINES, engine_class, installed_plugins
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.recipe.resolved import ResolvedRecipe
from rotdistill_core.testing import PicoWorkspace

SOURCE = """
from typing import ClassVar, Literal
from rotdistill_core.plugin.engine import Answer, engine
from rotdistill_core import hookimpl

class Echo:
    about = {"engine": "echo"}
    at_once = 0

    def __init__(self, times):
        self.times = times

    def chunks(self, asked):
        return None

    def answers(self, asked):
        for name, each in asked.items():
            yield name, Answer([each.prompt[-1]] * self.times, "length")

@engine
class Parrot:
    '''Repeat the last token.'''
    use: Literal["parrot"] = "parrot"
    times: int = 1
    '''How often.'''
    where: str = "here"
    '''Where it is.'''
    logistics: ClassVar[frozenset[str]] = frozenset({"where"})

    @hookimpl
    def connect(self, model):
        return Echo(self.times)

@hookimpl
def engines():
    return [Parrot]
"""
STEP = 'step = [{ use = "chop", layers = 1 }]'


@pytest.fixture
def recipe(pico_workspace: PicoWorkspace) -> Callable[..., Path]:
    pico_workspace.texts(blurbs=3, questions=3)
    pico_workspace.model()

    def write(table: str, **more: str) -> Path:
        return pico_workspace.recipe(STEP, tables=table, **more)

    return write


def refusal(path: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return re.sub(r"^line \d+: ", "", str(caught.value).removeprefix(f"{path}: "))


def test_the_default_is_the_engine_of_the_core(recipe: Callable[..., Path]) -> None:
    loaded = load_recipe(recipe(""))
    assert isinstance(loaded.engine.engine, Transformers)
    assert loaded.resolved()["engine"] == {"use": "transformers"}
    assert loaded.engine.origin.distribution == "rotdistill"
    assert "transformers" in installed_plugins(ENGINES)
    named = load_recipe(recipe('engine.use = "transformers"'))
    assert named.digest() == loaded.digest()
    assert named.engine.key() == loaded.engine.key()


def test_an_engine_of_a_plugin_answers_a_run(
    recipe: Callable[..., Path], install: Callable[..., str], pico_workspace: PicoWorkspace
) -> None:
    install("acme-parrot", "parrot", SOURCE, group=ENGINES)
    path = recipe('engine = { use = "parrot", times = 2 }')
    assert engine_class("parrot")[0].__name__ == "Parrot"
    outcome = pico_workspace.run(path)
    [chunk] = outcome.folder.glob("answers/teacher-heldout/*.json")
    content = json.loads(chunk.read_text())
    assert content["engine"] == {"engine": "echo"}
    assert len(content["answers"]) == 3
    for answer in content["answers"].values():
        first, second = answer["tokens"]
        assert first == second
        assert answer["finish"] == "length"
    assert json.loads((outcome.folder / "recipe.resolved.json").read_text())["engine"] == {
        "use": "parrot",
        "times": 2,
        "where": "here",
    }


def test_where_an_engine_is_changes_no_key(
    recipe: Callable[..., Path], install: Callable[..., str]
) -> None:
    install("acme-parrot", "parrot", SOURCE, group=ENGINES)

    def loaded(*sets: str) -> ResolvedRecipe:
        return load_recipe(recipe('engine.use = "parrot"'), sets)

    here, there, twice = loaded(), loaded("engine.where=there"), loaded("engine.times=2")
    assert settings_of(there.engine.engine) == {"use": "parrot", "times": 1}
    assert here.engine.key() == there.engine.key() != twice.engine.key()
    assert here.digest() == there.digest() != twice.digest()
    assert there.resolved()["engine"]["where"] == "there"


def test_options_of_one_engine_mean_nothing_to_another(
    recipe: Callable[..., Path], install: Callable[..., str]
) -> None:
    install("acme-parrot", "parrot", SOURCE, group=ENGINES)
    parent = recipe('engine = { use = "parrot", times = 2 }', name="parent")

    def child(table: str) -> object:
        path = parent.with_name("child.toml")
        path.write_text(f'extends = "{parent.name}"\nname = "child"\n{table}')
        return load_recipe(path).resolved()["engine"]

    assert child("") == {"use": "parrot", "times": 2, "where": "here"}
    assert child('engine.where = "there"') == {"use": "parrot", "times": 2, "where": "there"}
    assert child('engine.use = "transformers"') == {"use": "transformers"}


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ("engine = 1", "engine: must be a table"),
        ("engine.use = 1", "engine.use: must be one of "),
        (
            'engine.use = "transformer"',
            'engine: no engine "transformer" is installed. Did you mean',
        ),
        ("engine.time = 1", "engine: time: unknown key."),
        ('engin.use = "transformers"', 'engin: unknown key. Did you mean "engine"?'),
    ],
)
def test_a_wrong_table_is_refused(recipe: Callable[..., Path], table: str, problem: str) -> None:
    assert refusal(recipe(table)).startswith(problem)


@pytest.mark.parametrize(
    "table",
    [
        '{ use = "parrot", key = "abc-very-secret" }',
        '{ use = "parrot", API-Key = "abc-very-secret" }',
        '{ use = "parrot", where = "sk-very-secret" }',
        '{ use = "parrot", headers = { Authorization = "very-secret" } }',
        '{ use = "parrot", headers = ["Bearer very-secret"] }',
    ],
)
def test_a_secret_is_refused_and_not_shown(
    recipe: Callable[..., Path], install: Callable[..., str], table: str
) -> None:
    install("acme-parrot", "parrot", SOURCE, group=ENGINES)
    problem = refusal(recipe(f"engine = {table}"))
    assert "a secret has no place in a recipe" in problem
    assert 'key_env = "NAME"' in problem
    assert "very-secret" not in problem


def test_an_engine_without_its_hook_is_refused_where_it_is_made() -> None:
    with pytest.raises(PluginError, match="engine Mute must implement the hook `connect`"):

        @engine
        class Mute:
            use: str = "mute"
