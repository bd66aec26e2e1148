"""Recipes: read whole, checked whole, and every mistake named in one report."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotdistill_core.errors import RecipeError
from rotdistill_core.plugin.registry import step_class
from rotdistill_core.recipe.document import NAME_PATTERN
from rotdistill_core.recipe.load import _id_problems, load_recipe
from rotdistill_core.recipe.resolved import ResolvedRecipe
from rotdistill_core.recipe.schema import recipe_schema

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "recipes").glob("*.toml"))

HEAD = 'name = "trial"\nseed = 3\n[teacher]\nmodel = "big"\n[student]\nmodel = "small"\n'
STEPS = """
[[step]]
use = "chop"
layers = 4
[[step]]
use = "residuals"
[[step]]
id = "basis"
use = "procrustes"
[[step]]
id = "fold"
use = "basis-fold"
"""
VARIANTS = '[variants]\nbase = []\nfolded = ["basis", "fold"]\nonly-fold = ["fold"]\n'
FIVE_MISTAKES = """
name = "trial"
colour = "blue"
[teacher]
model = "big"
[student]
model = "small"
[[step]]
use = "chop"
layers = 4
max_angle_text = 3
[[step]]
use = "residuals"
student_texts = "many"
[[step]]
use = "procrustis"
[variants]
base = ["chopp"]
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write(tmp_path / "good.toml", HEAD + STEPS + VARIANTS)


def problems_of(path: Path, *sets: str) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, sets)
    assert caught.value.exit_code == 2
    assert all(problem.startswith(str(path.parent)) for problem in caught.value.problems)
    return caught.value.problems


def options(loaded: ResolvedRecipe, step_id: str) -> dict[str, Any]:
    return next(step for step in loaded.resolved()["step"] if step["id"] == step_id)


def test_a_valid_recipe_loads_with_defaults(good: Path) -> None:
    loaded = load_recipe(good)
    assert [(p.id, p.stage) for p in loaded.steps] == [
        ("chop", "fold"),
        ("residuals", "capture"),
        ("basis", "align"),
        ("fold", "fold"),
    ]
    assert (loaded.recipe.name, loaded.recipe.seed, loaded.recipe.student.save_dtype) == (
        "trial",
        3,
        "auto",
    )
    assert options(loaded, "chop")["max_angle_texts"] == 24
    assert loaded.steps[2].origin.distribution == "rotdistill-procrustes"
    assert loaded.text == good.read_text(encoding="utf-8")


def test_five_mistakes_are_five_problems_in_one_report(tmp_path: Path) -> None:
    problems = problems_of(write(tmp_path / "bad.toml", FIVE_MISTAKES))
    assert len(problems) == 5
    for wanted in (
        "colour: unknown key",
        'step "chop" (#1): max_angle_text: unknown key. Did you mean "max_angle_texts"?',
        'step "residuals" (#2): student_texts:',
        'no step "procrustis" is installed. Did you mean "procrustes"?',
        'variants.base: no step has the id "chopp". Did you mean "chop"?',
    ):
        assert sum(wanted in problem for problem in problems) == 1, wanted


@pytest.mark.parametrize(
    ("tables", "wanted"),
    [
        (STEPS.replace("layers = 4", ""), 'step "chop" (#1): options: say what stays'),
        (STEPS.replace('use = "residuals"', 'id = "r"'), 'step "r" (#2): use: missing'),
        (STEPS.replace('use = "residuals"', "student_texts = 3"), "step #2: use: missing"),
        (STEPS.replace('id = "fold"', 'id = "basis"'), "must be unique"),
        ("", "at least one [[step]] table is needed"),
        ('[step]\nuse = "residuals"\n', "at least one [[step]] table is needed"),
        (
            STEPS + "[samples]\nvalidatoin = 0.2\n",
            'samples.validatoin: unknown key. Did you mean "validation"?',
        ),
        (STEPS + "[samples]\nvalidation = nan\n", "samples.validation"),
        (STEPS + "[check]\nunfold = '1e-9'\n", "check.unfold"),
        (STEPS + '[variants]\n"a/b" = []\n', "variants.a/b"),
    ],
)
def test_a_mistake_is_named_with_its_key(tmp_path: Path, tables: str, wanted: str) -> None:
    problems = problems_of(write(tmp_path / "bad.toml", HEAD + tables))
    assert any(wanted in problem for problem in problems), problems


def test_unknown_observers_are_reported_with_the_other_problems(tmp_path: Path) -> None:
    problems = problems_of(
        write(tmp_path / "bad.toml", 'observers = ["rotation-santy", 3]\n' + FIVE_MISTAKES)
    )
    assert len(problems) == 8
    for wanted in (
        'observers: no observer "rotation-santy" is installed. Did you mean "rotation-sanity"?',
        'observers: no observer "3" is installed. There is: ',
        "observers.1: Input should be a valid string (it is 3).",
    ):
        assert sum(wanted in problem for problem in problems) == 1, (wanted, problems)
    assert (
        "observers: Input should be a valid list"
        in problems_of(write(tmp_path / "bad.toml", "observers = 3\n" + HEAD + STEPS))[0]
    )


@pytest.mark.parametrize("value", ['"4"', "true", "4.0"])
def test_step_options_are_not_coerced(tmp_path: Path, value: str) -> None:
    problems_of(
        write(
            tmp_path / "bad.toml",
            HEAD + STEPS.replace("layers = 4", f"layers = 4\ntexts = {value}"),
        )
    )


def test_one_wrong_value_of_an_option_with_two_types_is_named_by_its_key(tmp_path: Path) -> None:
    problems = problems_of(
        write(tmp_path / "bad.toml", HEAD + STEPS.replace("layers = 4", 'layers = "four"'))
    )
    assert all("chop" in problem and ": layers:" in problem for problem in problems), problems


@pytest.mark.parametrize("first", ["step = [1]\n", 'step = ["chop"]\n', "step = 3\n"])
def test_steps_that_are_no_tables_are_a_problem(tmp_path: Path, first: str) -> None:
    assert "step" in problems_of(write(tmp_path / "bad.toml", first + HEAD))[0]


def test_set_changes_steps_and_tables(good: Path) -> None:
    sets = (
        "chop.layers = [0, 1]",
        "basis.tie=2",
        "seed=9",
        "teacher.model=/other",
        "samples.limit=12",
        "name=again",
    )
    loaded = load_recipe(good, sets)
    assert options(loaded, "chop")["layers"] == [0, 1]
    assert options(loaded, "basis")["tie"] == 2
    assert loaded.recipe.seed == 9
    assert loaded.recipe.teacher.model == "/other"
    assert loaded.recipe.samples.limit == 12
    assert loaded.recipe.name == "again"


@pytest.mark.parametrize(
    ("item", "wanted"),
    [
        ("chop.layers", "write it as key.path=value"),
        ("chop..layers=3", "write it as key.path=value"),
        ("basiss.tie=2", 'no step or table is called "basiss". Did you mean "basis"?'),
        ("basis.tye=2", 'tye: unknown key. Did you mean "tie"?'),
        ("chop.max_angle_texts=big", "max_angle_texts"),
        ("seed=-1", "seed"),
        ("name.x=1", "name"),
        ("teacher.model.x=1", "teacher.model"),
    ],
)
def test_set_mistakes_are_problems(good: Path, item: str, wanted: str) -> None:
    problems = problems_of(good, item)
    assert len(problems) == 1
    assert wanted in problems[0]


def test_an_override_next_to_a_step_that_is_no_list_is_a_problem(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.toml", HEAD + '[step]\nuse = "residuals"\n')
    assert "at least one [[step]] table is needed" in problems_of(path, "seed=3")[0]


def child(tmp_path: Path, text: str) -> Path:
    write(tmp_path / "parent.toml", HEAD + STEPS + VARIANTS)
    return write(tmp_path / "child.toml", 'extends = "parent.toml"\nname = "child"\n' + text)


def test_extends_merges_tables_and_steps_by_id(tmp_path: Path) -> None:
    steps = '[[step]]\nid = "basis"\nuse = "procrustes"\ntie = 2\n[[step]]\nuse = "fidelity"\n'
    loaded = load_recipe(child(tmp_path, '[student]\nmodel = "other"\n' + steps))
    assert [p.id for p in loaded.steps] == ["chop", "residuals", "basis", "fold", "fidelity"]
    assert options(loaded, "basis")["tie"] == 2
    assert (loaded.recipe.name, loaded.recipe.seed) == ("child", 3)
    assert (loaded.recipe.teacher.model, loaded.recipe.student.model) == ("big", "other")
    assert set(loaded.recipe.variants) == {"base", "folded", "only-fold"}


@pytest.mark.parametrize(
    "step",
    [
        'use = "chop"\nmax_angle_texts = 5\n',
        'id = "chop"\nuse = "chop"\nmax_angle_texts = 5\n',
        'id = "chop"\nmax_angle_texts = 5\n',
    ],
)
def test_a_step_of_the_same_method_keeps_the_options_that_it_does_not_change(
    tmp_path: Path, step: str
) -> None:
    loaded = load_recipe(child(tmp_path, "[[step]]\n" + step))
    assert [p.id for p in loaded.steps] == ["chop", "residuals", "basis", "fold"]
    assert (options(loaded, "chop")["layers"], options(loaded, "chop")["max_angle_texts"]) == (4, 5)


@pytest.mark.parametrize("use", ['use = "chop"\n', ""])
def test_a_step_that_inherits_nothing_has_its_own_options_alone(tmp_path: Path, use: str) -> None:
    step = f'[[step]]\nid = "chop"\n{use}inherit = false\nneurons = 8\n'
    loaded = load_recipe(child(tmp_path, step))
    assert (options(loaded, "chop")["layers"], options(loaded, "chop")["neurons"]) == (None, 8)


def test_a_step_of_another_method_replaces_it_whole_and_in_its_place(tmp_path: Path) -> None:
    step = '[[step]]\nid = "chop"\nuse = "soups"\ningredients = ["student"]\n'
    loaded = load_recipe(child(tmp_path, step))
    assert (loaded.steps[0].id, options(loaded, "chop")["use"]) == ("chop", "soups")
    assert options(loaded, "chop")["layers"] is None  # the option of soups, not chop's 4


def test_a_table_in_the_options_is_taken_whole(tmp_path: Path) -> None:
    soup = '[[step]]\nuse = "soups"\ningredients = ["student"]\ntensors = { "*.mlp.*" = [1.0] }\n'
    write(tmp_path / "parent.toml", HEAD + soup)
    head = 'extends = "parent.toml"\n[[step]]\nid = "soups"\n'
    loaded = load_recipe(
        write(tmp_path / "child.toml", head + 'tensors = { "*.self_attn.*" = [0.5] }\n')
    )
    assert options(loaded, "soups")["ingredients"] == ["student"]
    assert options(loaded, "soups")["tensors"] == {"*.self_attn.*": [0.5]}


@pytest.mark.parametrize(
    ("step", "wanted"),
    [
        ('id = "new"\nmax_angle_texts = 5\n', "no such step has this id"),
        ('id = "new"\nuse = "fidelity"\ninherit = false\n', "inherit: unknown key"),
        ('id = "chop"\ninherit = 3\n', "inherit: unknown key"),
        ('id = "chop"\nkeep_fraction = 0.5\n', "write `inherit = false` in it"),
    ],
)
def test_a_step_that_cannot_be_extended_is_a_problem(
    tmp_path: Path, step: str, wanted: str
) -> None:
    assert wanted in problems_of(child(tmp_path, "[[step]]\n" + step))[0]


def test_only_a_step_with_inherited_options_is_told_how_to_leave_them(tmp_path: Path) -> None:
    replaced = '[[step]]\nid = "chop"\nuse = "fidelity"\nper_layers = true\n'
    assert "inherit = false" not in problems_of(child(tmp_path, replaced))[0]


def test_variants_are_taken_over_whole(tmp_path: Path) -> None:
    loaded = load_recipe(child(tmp_path, '[variants]\nmine = ["basis", "fold"]\n'))
    assert loaded.recipe.variants == {"mine": ["basis", "fold"]}
    assert loaded.notes == []


def test_a_toggle_that_no_new_variant_names_is_left_out_and_noted(tmp_path: Path) -> None:
    loaded = load_recipe(child(tmp_path, '[variants]\nbase = []\nmine = ["basis"]\n'))
    assert [p.id for p in loaded.chain("base")] == ["chop", "residuals"]
    assert [p.id for p in loaded.chain("mine")] == ["chop", "residuals", "basis"]
    (note,) = loaded.notes
    assert 'step "fold" is left out' in note
    # The same where an override takes the last name away.
    sets = ["variants.folded=['basis']", "variants.only-fold=[]"]
    overridden = load_recipe(tmp_path / "parent.toml", sets)
    assert (overridden.left_out, len(overridden.steps)) == (("fold",), 3)


def test_toggles_that_are_left_out_are_noted_in_one_sentence(tmp_path: Path) -> None:
    loaded = load_recipe(child(tmp_path, "[variants]\nbase = []\n"))
    assert loaded.left_out == ("basis", "fold")
    (note,) = loaded.notes
    assert 'steps "basis", "fold" are left out: they were toggles' in note
    assert note.endswith("no variant names them now.")


def test_a_toggle_of_which_a_new_variant_misspells_the_name_is_suggested(tmp_path: Path) -> None:
    problems = problems_of(child(tmp_path, '[variants]\nmine = ["bassis"]\n'))
    assert 'no step has the id "bassis". Did you mean "basis"?' in problems[0]


def test_variants_that_leave_out_every_step_are_a_problem(tmp_path: Path) -> None:
    write(
        tmp_path / "parent.toml",
        HEAD + '[[step]]\nuse = "fidelity"\n[variants]\na = ["fidelity"]\n',
    )
    path = write(tmp_path / "child.toml", 'extends = "parent.toml"\n[variants]\nbase = []\n')
    assert "at least one [[step]] table is needed" in problems_of(path)[0]


def test_the_32b_recipe_keeps_the_options_of_the_one_that_it_extends() -> None:
    residuals = options(load_recipe(ROOT / "recipes" / "tour_guide_qwen32b.toml"), "residuals")
    assert (residuals["student_texts"], residuals["dtype"]) == (48, "bfloat16")


def test_extends_two_levels_deep_is_refused(tmp_path: Path) -> None:
    child(tmp_path, "")
    assert (
        "one level only"
        in problems_of(write(tmp_path / "grandchild.toml", 'extends = "child.toml"\n'))[0]
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('extends = "nowhere.toml"\n', "nowhere.toml: cannot be read: No such file"),
        ("extends = 3\n", "extends"),
        ("extends = ['a']\n", "extends"),
    ],
)
def test_extending_nothing_is_a_problem(tmp_path: Path, text: str, wanted: str) -> None:
    assert wanted in problems_of(write(tmp_path / "child.toml", text))[0]


def test_two_steps_of_one_id_are_refused_under_extends_too(tmp_path: Path) -> None:
    twice = '[[step]]\nid = "x"\nuse = "fidelity"\n' * 2
    assert "must be unique" in problems_of(child(tmp_path, twice))[0]


@pytest.mark.parametrize(
    "text", ['[step]\nuse = "fidelity"\n', "[[step]]\nid = []\nuse = 'fidelity'\n"]
)
def test_malformed_steps_are_a_problem_under_extends_too(tmp_path: Path, text: str) -> None:
    problems_of(child(tmp_path, text))


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"name = ", "is not valid TOML"),
        (b"a = " + b"[" * 5000, "is not valid TOML"),
        (b'name = "\xff"', "is not UTF-8"),
        (b"#" * 1_000_001, "longer than 1000000 bytes"),
    ],
)
def test_an_unreadable_recipe_is_one_problem(tmp_path: Path, data: bytes, wanted: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(data)
    (problem,) = problems_of(path)
    assert wanted in problem


def test_a_missing_recipe_is_one_problem(tmp_path: Path) -> None:
    assert "cannot be read" in problems_of(tmp_path / "nowhere.toml")[0]


def test_the_digest_is_stable_and_follows_every_option(good: Path) -> None:
    digest = load_recipe(good).digest()
    good.write_text("# a comment\n" + good.read_text(encoding="utf-8"), encoding="utf-8")
    assert load_recipe(good).digest() == digest
    assert load_recipe(good, ["chop.max_angle_texts=24"]).digest() == digest
    others = {
        load_recipe(good, [item]).digest()
        for item in ("chop.max_angle_texts=25", "seed=4", "basis.tie=2")
    }
    assert len(others | {digest}) == 4


def test_a_chain_holds_the_untoggled_steps_and_the_variants_own_in_file_order(good: Path) -> None:
    loaded = load_recipe(good)
    chains = {name: [p.id for p in loaded.chain(name)] for name in loaded.recipe.variants}
    assert chains == {
        "base": ["chop", "residuals"],
        "folded": ["chop", "residuals", "basis", "fold"],
        "only-fold": ["chop", "residuals", "fold"],
    }


def test_the_schema_has_enums_and_requires_use() -> None:
    made = recipe_schema()
    assert '"const"' not in json.dumps(made)
    *names, without_use = [
        item["$ref"].rpartition("/")[2] for item in made["properties"]["step"]["items"]["anyOf"]
    ]
    assert made["$defs"][without_use]["required"] == ["id"]
    assert {"step.chop", "step.residuals", "step.basis-fold", "step.fidelity"} <= set(names)
    for name in names:
        one = made["$defs"][name]
        assert one["properties"]["use"]["enum"] == [name.removeprefix("step.")]
        assert "use" in one["required"]
        assert one["additionalProperties"] is False


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    loaded = load_recipe(path)
    assert all(loaded.chain(variant) for variant in loaded.recipe.variants)


def test_loading_a_recipe_imports_no_torch() -> None:
    code = (
        "import sys; from rotdistill_core import load_recipe; load_recipe(sys.argv[1]); "
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(ROOT / "recipes" / "tour_guide.toml")]
    assert (
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        == "False"
    )


def test_the_committed_schema_is_what_the_program_prints() -> None:
    committed = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text(encoding="utf-8"))
    assert committed == json.loads(json.dumps(recipe_schema()))


@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "../../../OUTSIDE",
        "/tmp/x",
        "save full",
        "a/b",
        ".hidden",
        "..",
        "",
        "x" * 81,
        "tab\t",
        "ünïcode",
        "a\nb",
        "a\n",
        "a\0b",
        "\x1b]0;pwned\x07",
        "\u202eb",
        "x\" onload=\"document.title=1+1+' INJECTED'//",
        "<script>",
        "$x$",
        "a\\b",
    ],
)
def test_a_step_id_is_a_name_and_no_path(good: Path, name: str) -> None:
    text = good.read_text(encoding="utf-8")
    step = f'\n[[step]]\nid = {json.dumps(name)}\nuse = "fidelity"\n'
    good.write_text(text + step, encoding="utf-8")
    assert any("id: must be a name" in problem for problem in problems_of(good))


@given(st.text(min_size=1, max_size=90))
def test_only_names_are_ids(name: str) -> None:
    accepted = not list(_id_problems(name, set()))
    assert accepted == bool(re.fullmatch(NAME_PATTERN, name))
    if accepted:
        assert Path(name).name == name and name not in (".", "..")


def test_overrides_may_be_python_values(good: Path) -> None:
    loaded = load_recipe(good, {"chop.layers": [0, 2], "seed": 7})
    assert options(loaded, "chop")["layers"] == [0, 2]
    assert loaded.recipe.seed == 7
    assert load_recipe(good, {"seed": 7}).digest() == load_recipe(good, ["seed=7"]).digest()


def test_a_step_cannot_be_replaced_by_an_override(good: Path) -> None:
    assert "write it as key.path=value" in problems_of(good, "chop=3")[0]


def test_baseline_and_headline_are_marked_or_go_by_rule(good: Path) -> None:
    loaded = load_recipe(good)
    assert (loaded.baseline, loaded.headline) == ("base", "only-fold")
    marked = load_recipe(good, {"baseline": "folded", "headline": "base"})
    assert (marked.baseline, marked.headline) == ("folded", "base")
    assert marked.digest() == loaded.digest()
    assert "there is no variant" in problems_of(good, "baseline=nowhere")[0]


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/b", "", "x" * 81, "a\n", "\x1b]0;x\x07", '"><svg', "$x$"]
)
@pytest.mark.parametrize("place", ["name", "variants"])
def test_runs_and_variants_have_names_and_no_paths(good: Path, place: str, name: str) -> None:
    value: object = name if place == "name" else {name: [], "full": ["basis", "fold"]}
    with pytest.raises(RecipeError) as caught:
        load_recipe(good, {place: value})
    assert all(f"{good}: {place}" in problem for problem in caught.value.problems)


def test_a_step_that_reads_all_rows_is_refused_after_a_capture_of_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = """
[[step]]
id = "states"
use = "residuals"
store = "moments"

[[step]]
id = "basis"
use = "procrustes"

[[step]]
id = "refit"
use = "writer-refit"
"""
    path = write(tmp_path / "sums.toml", HEAD + steps + "[variants]\nbase = []\nfull = ['refit']\n")
    load_recipe(path)
    monkeypatch.setattr(step_class("writer-refit")[0], "needs_all_rows", True, raising=False)
    [problem] = problems_of(path)
    assert 'step "refit": reads the captured rows of all texts, and step "states" keeps' in problem
    assert 'Set store = "rows" in step "states", and leave out its student_texts.' in problem
    load_recipe(path, ["states.store=rows"])
    assert problems_of(path, "states.store=rows", "states.student_texts=3") == (problem,)
    without = HEAD + steps.partition('\n[[step]]\nid = "refit"')[0] + "[variants]\nbase = []\n"
    load_recipe(write(path, without))


def test_steps_that_have_to_show_a_gain_are_named() -> None:
    recipes = Path(__file__).parents[2] / "recipes"
    assert load_recipe(recipes / "lessons.toml").judged == ["refit", "lora"]
    merge = recipes / "merge_anchor.toml"
    assert load_recipe(merge).judged == []
    assert load_recipe(merge, {"mix.require_improvement": True}).judged == ["mix"]
