"""A mistake in a recipe is named with its line, wherever and however its key is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from rotdistill_core.errors import RecipeError
from rotdistill_core.recipe.lines import MAX_LETTERS, Source
from rotdistill_core.recipe.load import load_recipe

PARENT = """name = "trial"
[teacher]
model = "a"
[student]
model = "b"
[[step]]
use = "residuals"
[[step]]
id = "basis"
use = "procrustes"
[[step]]
use = "fidelity"
"""


def problems_of(path: Path, *sets: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, sets)
    return [problem.removeprefix(f"{path}: ") for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (f"{PARENT}tye = 2\n", 'line 13: step "fidelity" (#3): tye: unknown key.'),
        (
            PARENT.replace('procrustes"', 'procrustes"\n# tye\ntye = 2'),
            'line 12: step "basis" (#2): tye: unknown key. Did you mean "tie"?',
        ),
        (
            PARENT.replace('procrustes"', 'procrustes"\ntie = 0'),
            'line 11: step "basis" (#2): tie: ',
        ),
        (
            PARENT.replace('procrustes"', 'procrustis"'),
            'line 10: step "basis" (#2): no step "procrustis" is installed.',
        ),
        (f"colour = 1\n{PARENT}", "line 1: colour: unknown key."),
        (f"{PARENT}[colour]\nx = 1\n", "line 13: colour: unknown key."),
        (f"{PARENT}[samples]\nvalidatoin = 0.2\n", "line 14: samples.validatoin: unknown key."),
        (f"samples.validatoin = 0.2\n{PARENT}", "line 1: samples.validatoin: unknown key."),
        (
            f'samples = {{ limit = 3,\t"validatoin" = 0.2 }}\n{PARENT}',
            "line 1: samples.validatoin: unknown key.",
        ),
        (
            f'description = """\nvalidatoin = 1\n"""\n{PARENT}[samples]\nvalidatoin = 0.2\n',
            "line 17: samples.validatoin: unknown key.",
        ),
        (f"{PARENT}[engine]\nuse = 'transformers'\ntime = 1\n", "line 15: engine: time: unknown"),
        (
            f'{PARENT}[variants]\nbase = []\nfull = ["bassis"]\n',
            'line 15: variants.full: no step has the id "bassis".',
        ),
        (f'observers = ["reprot"]\n{PARENT}', "line 1: observers: "),
        (f"{PARENT}[variants]\nb = []\n", None),
        (f'headline = "c"\n{PARENT}[variants]\nb = []\n', "line 1: headline: there is no variant"),
        (
            PARENT.replace('use = "fidelity"', 'id = "basis"\nuse = "fidelity"'),
            'line 12: step "basis" (#3): id: must be unique',
        ),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, text: str, wanted: str | None) -> None:
    path = tmp_path / "trial.toml"
    path.write_text(text)
    if wanted is None:
        load_recipe(path)
    else:
        assert any(problem.startswith(wanted) for problem in problems_of(path)), problems_of(path)


def test_a_mistake_of_the_extended_recipe_names_that_file(tmp_path: Path) -> None:
    parent, child = tmp_path / "parent.toml", tmp_path / "child.toml"
    parent.write_text(PARENT.replace('procrustes"', 'procrustes"\ntye = 2'))
    child.write_text('extends = "parent.toml"\n[[step]]\nid = "basis"\nwhitn = "full"\n')
    assert [problem.partition("Did")[0] for problem in problems_of(child)] == [
        f'in {parent}, line 11: step "basis" (#2): tye: unknown key. ',
        'line 4: step "basis" (#2): whitn: unknown key. ',
    ]


def test_what_an_override_sets_has_no_line(tmp_path: Path) -> None:
    path = tmp_path / "trial.toml"
    path.write_text(PARENT.replace('procrustes"', 'procrustes"\ntie = 2'))
    for key in ("tie", "tye"):
        (problem,) = problems_of(path, f"basis.{key}=0")
        assert problem.startswith(f'step "basis" (#2): {key}: ')


def test_what_cannot_be_told_is_not_claimed() -> None:
    source = Source(Path("x"), "[a]\nb = [{ c = 1 }]\n")
    assert source.line_of(["a", "b", "0", "c"]) == 2
    assert source.line_of(["a", "b", "0"]) == 2
    assert source.line_of(["a"]) == 1
    assert source.line_of(["a", "d"]) is None
    assert source.line_of([]) is None
    assert Source(Path("x"), "#" * MAX_LETTERS + "\na = 1").line_of(["a"]) is None
