"""`check RECIPE`: overrides, notes, and the resolved recipe as TOML that is the same recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rotdistill_core.errors import RecipeError
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.recipe.resolved import ResolvedRecipe
from rotdistill_core.testing import PicoWorkspace, command_line

RECIPES = Path(__file__).parents[3] / "recipes"
SHIPPED = sorted(path.name for path in RECIPES.glob("*.toml"))
TRICKY = r"""
name = "tricky"
observers = []
teacher.model = 'C:\models\"big" 大'
student.model = "tab\tand\u0001and\nnewline"
[check]
unfold = 1e-300
[variants]
"a.b" = ["mix.1"]
"1" = []
[[step]]
id = "mix.1"
use = "soups"
ingredients = ["student", "it's"]
tensors = { "*.mlp.*" = [1, 0.1], "a\"b" = [0, 3.0e-7] }
"""


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """Return a folder with copies of the shipped recipes, next to their texts."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    for path in RECIPES.glob("*.toml"):
        shutil.copy(path, folder)
    (tmp_path / "samples").symlink_to(RECIPES.parent / "samples")
    return folder


def checked(*words: str | Path) -> str:
    """Return what `check` prints on stdout; the recipe is valid."""
    code, out, err = command_line("check", *map(str, words))
    assert code == 0, err
    return out


def same_recipe(path: Path, *sets: str) -> ResolvedRecipe:
    """Return a recipe after checking that what `--resolved` prints of it is the same recipe."""
    words = [word for item in sets for word in ("--set", item)]
    again = path.with_name("again.toml")
    again.write_text(checked(path, *words, "--resolved"), encoding="utf-8")
    one, two = load_recipe(path, sets), load_recipe(again)
    assert two.digest() == one.digest()
    assert two.document() == one.document()
    assert two.recipe.observers == one.recipe.observers
    assert list(two.recipe.variants) == list(one.recipe.variants)  # the order marks them
    assert checked(again, "--resolved") == again.read_text(encoding="utf-8")
    return two


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_is_the_same_when_it_is_printed(recipes: Path, name: str) -> None:
    same_recipe(recipes / name)


def test_a_printed_recipe_needs_no_parent_and_has_the_overrides_and_the_defaults(
    recipes: Path,
) -> None:
    sets = ("chop.layers=18", "samples.limit=50", "variants={ base = [], again = ['refit'] }")
    printed = same_recipe(recipes / "depth_cut.toml", *sets)
    text = (recipes / "again.toml").read_text(encoding="utf-8")
    for line in ("layers = 18", "limit = 50", "alpha = 1.0", "[[step]]"):
        assert line in text.splitlines(), line
    assert "extends" not in text
    assert "keep_fraction" not in text
    assert printed.recipe.variants == {"base": [], "again": ["refit"]}
    assert (printed.recipe.baseline, printed.recipe.headline) == ("base", "again")


def test_text_numbers_and_keys_of_any_kind_survive(recipes: Path) -> None:
    path = recipes / "tricky.toml"
    path.write_text(TRICKY, encoding="utf-8")
    printed = same_recipe(path, "teacher.revision='''two \"'\" quotes'''")
    assert printed.recipe.teacher.revision == 'two "\'" quotes'
    assert list(printed.recipe.variants) == ["a.b", "1"]


def test_json_is_what_the_hash_covers_with_or_without_resolved(recipes: Path) -> None:
    path = recipes / "depth_cut.toml"
    document = json.loads(checked(path, "--set", "chop.layers=18", "--json"))
    assert document == load_recipe(path, ["chop.layers=18"]).resolved()
    again = checked(path, "--set", "chop.layers=18", "--json", "--resolved")
    assert json.loads(again) == document


def test_an_override_is_checked_too(recipes: Path) -> None:
    code, out, err = command_line(
        "check", str(recipes / "depth_cut.toml"), "--set", "chop.layer=18", "--resolved"
    )
    assert (code, out) == (RecipeError.exit_code, "")
    assert "layer: unknown key" in err


@pytest.mark.parametrize("words", [("--resolved",), ("--set", "chop.layers=18")])
def test_options_of_a_recipe_are_refused_for_a_run(tmp_path: Path, words: tuple[str, ...]) -> None:
    code, out, err = command_line("check", str(tmp_path), *words)
    assert (code, out) == (RecipeError.exit_code, "")
    assert "is not a recipe" in err


@pytest.mark.parametrize("words", [(), ("--resolved",), ("--json",)])
def test_a_toggle_that_is_left_out_is_noted(recipes: Path, words: tuple[str, ...]) -> None:
    path = recipes / "child.toml"
    path.write_text('extends = "compress.toml"\n[variants]\nbase = []\n', encoding="utf-8")
    code, out, err = command_line("check", str(path), *words)
    assert (code, "refit" in out) == (0, False)
    assert 'step "refit" is left out' in err


@pytest.fixture
def own(pico_workspace: PicoWorkspace) -> PicoWorkspace:
    """Return a workspace with a recipe of its own texts."""
    pico_workspace.recipe('variants = { base = [] }\nstep = [{ use = "chop", layers = 1 }]')
    return pico_workspace


@pytest.mark.parametrize("words", [(), ("--resolved",), ("--json",)])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("index.tsv", b"id\tlanguage\n", "index.tsv: line 1: has none of the columns"),
        ("heldout.tsv", b"\xff\xfei\0d\0", "heldout.tsv: is not UTF-8 text but UTF-16"),
        ("style.md", b"Be\x1b[31m brief.", "style.md: line 1: holds U+001B"),
    ],
    ids=["columns", "another encoding", "an escape"],
)
def test_texts_are_read(
    own: PicoWorkspace, words: tuple[str, ...], name: str, content: bytes, message: str
) -> None:
    assert own.command("check", "trial.toml", *words)[0] == 0
    (own.folder / "texts" / name).write_bytes(content)
    code, out, err = own.command("check", "trial.toml", *words)
    assert (code, bool(out)) == (RecipeError.exit_code, bool(words))
    assert message in err


@pytest.mark.parametrize("key", ["index", "heldout", "style", "guard"])
def test_the_texts_of_an_override_are_read(own: PicoWorkspace, key: str) -> None:
    code, _, err = own.command("check", "trial.toml", "--set", f"samples.{key}=texts/gone")
    assert code == RecipeError.exit_code
    assert f"samples.{key}" in err or "[samples]" in err
    assert "No such file" in err


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        ("chop.layers=9", 2, 'step "chop": layers = 9, but the student has 2'),
        ("student.model=gone", 3, "gone: is neither a folder here nor"),
        ("teacher.model=texts", 3, "texts"),
    ],
)
def test_models_are_looked_at_without_loading(
    own: PicoWorkspace, changed: str, code: int, message: str
) -> None:
    found, _, err = own.command("check", "trial.toml", "--set", changed)
    assert (found, "fine" in err) == (code, False)
    assert message in err


def test_a_model_that_would_be_downloaded_is_named(own: PicoWorkspace) -> None:
    code, _, err = own.command("check", "trial.toml", "--set", "teacher.model=owner/gone")
    assert (code, "fine" in err) == (0, True)
    assert "owner/gone: was not looked at" in err


@pytest.mark.parametrize("verb", ["check", "plan", "run"])
def test_a_model_beside_the_recipe_is_named_from_elsewhere(
    own: PicoWorkspace, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.chdir(own.folder.parent)
    code, _, err = command_line(verb, f"{own.folder.name}/trial.toml")
    assert code == 3
    assert f'write model = "{own.folder.name}/model"' in err


def test_check_and_plan_count_texts_in_the_same_words(own: PicoWorkspace) -> None:
    _, _, err = own.command("check", "trial.toml", "--set", "samples.own_answers=4")
    (line,) = [line for line in err.splitlines() if " of texts/index.tsv: " in line]
    _, out, _ = own.command("plan", "trial.toml", "--set", "samples.own_answers=4")
    assert line.removeprefix("texts: ") in out
    assert "against the teacher's answers, not yours" in err
    assert "against the teacher's answers, not yours" in out


def test_a_gpu_of_another_machine_is_a_warning(own: PicoWorkspace) -> None:
    code, _, err = own.command("check", "trial.toml", "--set", "teacher.device=cuda:77")
    assert (code, err.count("warning: ")) == (0, 1)
    assert 'warning: teacher.device = "cuda:77": of GPUs this machine has' in err


def test_a_chat_looks_for_its_device_before_the_model(own: PicoWorkspace) -> None:
    code, _, err = own.command("chat", "--model", "gone", "--device", "cuda:77")
    assert code == 3
    assert 'error device = "cuda:77": ' in err
