"""Recipes of enormous numbers, names, depths and counts end in a second, in one short report."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from rotdistill_core.errors import FEW, RecipeError
from rotdistill_core.recipe.load import load_recipe

HEAD = 'name = "trial"\nteacher.model = "big"\nstudent.model = "small"\nobservers = []\n'
STEP = '[[step]]\nuse = "chop"\nlayers = 1\n'
SECONDS = 8
"""Loose: another process may have the machine. The faults took minutes."""


def refused(tmp_path: Path, text: str, *sets: str) -> tuple[str, ...]:
    """Return the problems of a recipe, after checking that they come soon and are short."""
    path = tmp_path / "r.toml"
    path.write_text(text, encoding="utf-8")
    started = time.monotonic()
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, sets)
    assert time.monotonic() - started < SECONDS
    assert len(str(caught.value)) < 20_000
    return caught.value.problems


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"seed = 1{'0' * 5000}\n{HEAD}{STEP}", "is not valid TOML: Exceeds the limit"),
        (f"seed = {2**63}\n{HEAD}{STEP}", "seed: must be an integer of 64 bits"),
        (f"seed = 0x{'f' * 20_000}\n{HEAD}{STEP}", "is not valid TOML: Exceeds the limit"),
        (HEAD + STEP.replace("1", "1" * 5000), "is not valid TOML: Exceeds the limit"),
        (HEAD + STEP.replace("1", "1" * 4000), "step.layers: must be an integer of 64 bits"),
        (f"samples.limit = -{2**64}\n{HEAD}{STEP}", "samples.limit: must be an integer of 64"),
        (f"check.unfold = 1e999\n{HEAD}{STEP}", "check.unfold: Input should be a finite number"),
        (f"check.unfold = -nan\n{HEAD}{STEP}", "check.unfold: Input should be a finite number"),
        (f"seed = {'[' * 5000}\n{HEAD}{STEP}", "is not valid TOML: maximum recursion depth"),
        (f"{'a.' * 50_000}a = 1\n{HEAD}{STEP}", "a key has more than 64 parts"),
        (f"{'a' * 900_000} = 1\n{HEAD}{STEP}", "unknown key"),
        (f'{HEAD}[[step]]\nuse = "{"a" * 900_000}"\n', "id: must be a name"),
    ],
)
def test_enormous_values_are_refused(tmp_path: Path, text: str, message: str) -> None:
    assert message in "\n".join(refused(tmp_path, text))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"chop.layers=1{'0' * 5000}", "layers: Input should be a valid integer"),
        (f"seed=0x{'f' * 20_000}", "seed: must be an integer of 64 bits"),
        ("check.unfold=inf", "check.unfold: Input should be a finite number"),
        (f"samples.{'a.' * 5000}a=1", "write it as key.path=value"),
        ("teacher.model=a\udcff", "teacher.model: Input should be a valid string"),
    ],
)
def test_enormous_overrides_are_refused(tmp_path: Path, override: str, message: str) -> None:
    assert message in "\n".join(refused(tmp_path, HEAD + STEP, override))


@pytest.mark.parametrize(
    "text",
    [
        HEAD + STEP + "".join(f"k{k} = 1\n" for k in range(20_000)),
        "".join(f"k{k} = 1\n" for k in range(20_000)) + HEAD + STEP,
        HEAD.replace("[]", str([f"o{k}" for k in range(20_000)])) + STEP,
        f"{HEAD}variants.base = {[f's{k}' for k in range(20_000)]}\n{STEP}",
        HEAD + "".join(f'[[step]]\nid = "s{k}"\nuse = "chup{k}"\n' for k in range(900)),
    ],
    ids=["options", "keys", "observers", "toggles", "methods"],
)
def test_of_many_mistakes_of_a_kind_the_first_are_listed(tmp_path: Path, text: str) -> None:
    problems = refused(tmp_path, text)
    assert FEW < len(problems) < 2 * FEW + 4
    assert any("there are more problems like these" in problem for problem in problems)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + '[[step]]\nuse = "residuals"\n' * 22_000, "step: there are 22000; 1000 are the"),
        (HEAD + '[[step]]\nuse = "nothing"\n' * 22_000, "step: there are 22000; 1000 are the"),
        (
            HEAD + "".join(f"variants.v{k} = []\n" for k in range(20_000)) + STEP,
            "variants: there are 20000; 1000 are the most",
        ),
    ],
    ids=["steps", "unknown steps", "variants"],
)
def test_counts_are_looked_at_first(tmp_path: Path, text: str, message: str) -> None:
    (problem,) = refused(tmp_path, text)
    assert message in problem


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8"])
@pytest.mark.parametrize("end", ["\r\n", "\r", "\n"])
def test_a_recipe_is_the_same_whichever_editor_saves_it(
    tmp_path: Path, encoding: str, end: str
) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes((HEAD + STEP).replace("\n", end).encode(encoding))
    loaded = load_recipe(path)
    assert loaded.text == HEAD + STEP
    assert [step.id for step in loaded.steps] == ["chop"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "latin-1"])
def test_a_recipe_in_another_encoding_is_one_problem(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(("# é\n" + HEAD + STEP).encode(encoding))
    with pytest.raises(RecipeError, match="is not UTF-8 text"):
        load_recipe(path)
