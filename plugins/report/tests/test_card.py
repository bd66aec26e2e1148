"""The card of a checkpoint: sources, licences, results, how to undo it."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from rotdistill_report._card import licence_of, public_name, python_text, strictest

from rotdistill_core.characters import visible
from rotdistill_core.recipe.as_toml import resolved_toml
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.testing import PicoWorkspace, pico_model
from rotdistill_core.testing.pico import TEMPLATE

STEPS = """
variants.base = []
variants.turned = ["procrustes", "basis-fold"]
variants.full = ["procrustes", "basis-fold", "lm-head-ridge"]
step = [
    { use = "residuals" },
    { use = "procrustes" },
    { use = "basis-fold" },
    { use = "lm-head-ridge" },
    { use = "fidelity" },
]
"""


@pytest.fixture
def workspace(tmp_path: Path) -> PicoWorkspace:
    """Return a workspace with a teacher and a student."""
    workspace = PicoWorkspace(tmp_path)
    workspace.texts()
    workspace.model("teacher")
    workspace.model("student", seed=1)
    return workspace


@pytest.fixture
def recipe(workspace: PicoWorkspace) -> Path:
    return workspace.recipe(STEPS, teacher="teacher", student="student", observers=("report",))


@pytest.mark.parametrize(
    ("licences", "strictest_of_them"),
    [
        (["apache-2.0", "mit"], "apache-2.0"),
        (["mit", "gpl-3.0"], "gpl-3.0"),
        (["gpl-3.0", "cc-by-nc-4.0"], "cc-by-nc-4.0"),
        (["cc-by-sa-4.0", "cc-by-4.0"], "cc-by-sa-4.0"),
        (["agpl-3.0", "gpl-2.0"], "agpl-3.0"),
        (["apache-2.0", "llama3.2"], "llama3.2"),
        (["cc-by-nc-4.0", "unknown"], "unknown"),
        (["lgpl-3.0", "apache-2.0"], "lgpl-3.0"),
        (["mit"], "mit"),
        (["other", "mit"], "other"),
    ],
)
def test_the_strictest_licence_applies(licences: list[str], strictest_of_them: str) -> None:
    assert strictest(licences) == strictest_of_them
    assert strictest(licences[::-1]) == strictest_of_them


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model", "apache-2.0"),
        ('---\nlicense: "MIT"\n---', "mit"),
        ("# Model\nlicense: mit\n", "unknown"),
        ("---\nlicense: other\nlicense_name: qwen-research\n---", "other"),
        (None, "unknown"),
    ],
)
def test_a_licence_is_read_from_the_front_matter(
    tmp_path: Path, card: str | None, licence: str
) -> None:
    model = pico_model(tmp_path / "model")
    if card is not None:
        (model.folder / "README.md").write_text(card, encoding="utf-8")
    assert licence_of(model) == licence


def test_a_card_names_sources_results_and_how_to_undo_each_step(
    workspace: PicoWorkspace, recipe: Path
) -> None:
    licences = {"teacher": "cc-by-nc-4.0", "student": "apache-2.0"}
    for role, licence in licences.items():
        card = f"---\nlicense: {licence}\n---\n"
        (workspace.folder / role / "README.md").write_text(card, encoding="utf-8")
    outcome = workspace.run(recipe)
    cards = {
        name: (folder / "README.md").read_text(encoding="utf-8")
        for name, folder in outcome.checkpoints.items()
    }
    report = json.loads((outcome.folder / "report.json").read_text(encoding="utf-8"))
    assert set(cards) == {"base", "turned", "full"}
    for name, card in cards.items():
        _, front_matter, body = card.split("---\n", 2)
        assert "license: cc-by-nc-4.0\n" in front_matter
        assert "base_model_relation: finetune\n" in front_matter
        assert '- "en"\n' in front_matter
        assert '- "student"\n' in front_matter
        assert '- "teacher"\n' in front_matter
        assert outcome.pair.student.sha256 in body
        assert outcome.pair.teacher.sha256 in body
        kl = report["figures"][name]["kl"]
        assert f"| {kl['text']} | {kl['change']} |" in body
        assert resolved_toml(load_recipe(recipe)).rstrip() in body
    assert "Nothing was changed." in cards["base"]
    assert "basis-fold: exact, logits do not change." in cards["turned"]
    assert "cannot be undone" not in cards["turned"]
    assert "lm-head-ridge: changed what the model computes" in cards["full"]


def test_a_rewritten_card_leaves_the_checkpoint_valid(
    workspace: PicoWorkspace, recipe: Path
) -> None:
    folder = workspace.run(recipe).checkpoints["full"]
    card, weights = folder / "README.md", folder / "model.safetensors"
    written = {file: file.stat().st_mtime_ns for file in (card, weights)}
    # Nothing has changed, so nothing is written.
    assert workspace.run(recipe).checkpoints["full"] == folder
    assert card.stat().st_mtime_ns == written[card]
    # A lost card is written again, and the checkpoint is reused.
    card.unlink()
    assert workspace.run(recipe).checkpoints["full"] == folder
    assert card.is_file()
    assert weights.stat().st_mtime_ns == written[weights]
    assert "README.md" not in json.loads((folder / "COMPLETE").read_text(encoding="utf-8"))


def test_a_card_shows_the_recipe_that_made_the_checkpoint(
    workspace: PicoWorkspace, recipe: Path
) -> None:
    child = workspace.folder / "child.toml"
    child.write_text(f'extends = "{recipe.name}"\nname = "child"\n', encoding="utf-8")
    override = "lm-head-ridge.ridge=[7.0]"
    outcome = workspace.run(child, [override])
    folder = outcome.checkpoints["full"]
    shown = re.search(r"```toml\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert shown
    again = workspace.folder / "again.toml"
    again.write_text(shown[1], encoding="utf-8")
    assert load_recipe(again).digest() == load_recipe(child, [override]).digest()
    assert (folder / "recipe.toml").read_text().rstrip() == shown[1].rstrip()
    assert "ridge = [\n    7.0,\n]" in shown[1]


UNCHANGED = """
step = [{ use = "residuals" }, { use = "fidelity" }]
variants.base = []
"""


def card_of(workspace: PicoWorkspace, *sets: str) -> str:
    """Return the card of the model as it is."""
    recipe = workspace.recipe(
        UNCHANGED, teacher="student", student="student", observers=("report",)
    )
    folder = workspace.run(recipe, sets).checkpoints["base"]
    return (folder / "README.md").read_text(encoding="utf-8")


def section(card: str) -> str:
    return card.partition("## How to ask\n")[2].partition("\n## ")[0]


def test_a_card_lists_the_languages_of_fitted_texts_alone(workspace: PicoWorkspace) -> None:
    guard = workspace.folder / "texts/guard.tsv"
    guard.write_text(guard.read_text().replace("\ten\t", "\tfr\t"), encoding="utf-8")
    held = workspace.folder / "texts/heldout.tsv"
    held.write_text(held.read_text().replace("\ten\t", "\tde\t"), encoding="utf-8")
    front_matter = card_of(workspace, "samples.guard=texts/guard.tsv").split("---\n")[1]
    assert 'language:\n- "en"\ntags' in front_matter


NO_SYSTEM_ROLE = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"


@pytest.mark.parametrize("template", [TEMPLATE, NO_SYSTEM_ROLE + TEMPLATE, None])
def test_a_card_tells_how_to_ask_and_its_example_runs(
    workspace: PicoWorkspace,
    template: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = workspace.folder / "student/chat_template.jinja"
    path.unlink()
    if template:
        path.write_text(template, encoding="utf-8")
    card = card_of(workspace)
    asking = section(card)
    assert '\nSYSTEM = """w1 w2 w3 w4"""\n' in asking
    assert ("apply_chat_template" in asking) is bool(template)
    assert ("written plainly" in asking) is (template is None)
    assert ('"role": "system"' in asking) is (template == TEMPLATE)
    found = re.search(r"```python\n(.*?)```", asking, re.DOTALL)
    assert found
    monkeypatch.chdir(next(workspace.folder.glob("runs/*/checkpoints/base")))
    capsys.readouterr()
    exec(found[1].replace("Your question?", "w7 w8"), {})
    written = capsys.readouterr().out
    assert "w1 w2 w3 w4" in written
    assert "w7 w8" in written


@pytest.mark.parametrize(
    "text",
    [
        "one\ntwo",
        'say "no"',
        '""" + exit() + """',
        "\\",
        '\\"',
        "a\\n\tb\r\n",
        "\x1b[2J\u202e",
        "```",
    ],
)
def test_a_prompt_in_an_example_evaluates_to_itself(text: str) -> None:
    literal = python_text(text)
    assert ast.literal_eval(literal) == text
    assert visible(literal) == literal


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        (["w1 w2"], '\nSYSTEM = """w1 w2"""\n'),
        (["w1 w2", "w3"], "each text of the run brings its own, 2 different ones"),
        ([None], "Without a system prompt: the texts of the run have none."),
    ],
)
def test_a_card_knows_system_prompts_that_rows_bring_along(
    workspace: PicoWorkspace, prompts: list[str | None], sentence: str
) -> None:
    rows = []
    for k in range(12):
        turns = [("user", f"w{k + 5} w{k + 6}"), ("assistant", f"w{k + 9} w4")]
        prompt = prompts[k % len(prompts)]
        messages = [("system", prompt), *turns] if prompt else turns
        rows.append({"messages": [{"role": role, "content": text} for role, text in messages]})
    text = "\n".join(json.dumps({**row, "language": "en"}) for row in rows)
    (workspace.folder / "rows.jsonl").write_text(text, encoding="utf-8")
    head = 'name = "rows"\nteacher.model = "student"\nstudent.model = "student"\n'
    head += 'samples = { index = "rows.jsonl", heldout_share = 0.3, validation = 0.3 }\n'
    recipe = workspace.folder / "rows.toml"
    recipe.write_text(f'{head}observers = ["report"]\n{UNCHANGED}\n', encoding="utf-8")
    folder = workspace.run(recipe).checkpoints["base"]
    asking = section((folder / "README.md").read_text(encoding="utf-8"))
    assert sentence in asking
    assert ("SYSTEM" in asking) is (prompts != [None])


OTHER_TEMPLATE = "{% for m in messages %}<system> {{ m.content }} <end> {% endfor %}"


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (OTHER_TEMPLATE, "those of the teacher, teacher, in whose format the texts of the run "),
        (None, "were written; the student has no chat template."),
        (TEMPLATE, None),
    ],
)
def test_a_card_says_whose_chat_template_a_checkpoint_has(
    workspace: PicoWorkspace, recipe: Path, template: str | None, sentence: str | None
) -> None:
    path = workspace.folder / "student/chat_template.jinja"
    path.unlink()
    if template:
        path.write_text(template, encoding="utf-8")
    card = (workspace.run(recipe).checkpoints["base"] / "README.md").read_text(encoding="utf-8")
    assert ("those of the teacher" in card) is (sentence is not None)
    assert sentence is None or sentence in card
    assert "writes the date" not in card


def test_a_card_says_on_which_day_the_texts_were_written(
    workspace: PicoWorkspace, recipe: Path
) -> None:
    for role in ("teacher", "student"):
        path = workspace.folder / role / "chat_template.jinja"
        path.write_text("w{{ strftime_now('%d') | int }} " + TEMPLATE, encoding="utf-8")
    outcome = workspace.run(recipe, ["samples.date=2025-07-01"])
    path = outcome.checkpoints["base"] / "README.md"
    card = path.read_text(encoding="utf-8")
    assert "The texts of the run have 2025-07-01;" in card
    assert "those of the teacher" not in card
    # The verb that writes a report again knows the day, too.
    path.unlink()
    assert workspace.command("report", outcome.folder.name)[0] == 0
    assert path.read_text(encoding="utf-8") == card


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-3B"),
        ("run:tour-guide/full", "run:tour-guide/full"),
        ("package:weights/model.gguf", "package:weights/model.gguf"),
        ("/home/someone/models/mine", "mine"),
        ("./models/mine", "mine"),
        ("~/models/mine.gguf", "mine.gguf"),
        (
            "/home/someone/.cache/huggingface/hub/models--Qwen--Qwen2.5-3B/snapshots/0123",
            "Qwen/Qwen2.5-3B",
        ),
    ],
)
def test_a_card_names_no_private_folder(reference: str, name: str) -> None:
    assert public_name(ModelRef(model=reference)) == name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_not_shown_as_what_an_exact_step_changed(
    workspace: PicoWorkspace, dtype: str
) -> None:
    steps = """
    variants = { base = [], turned = ["rotate", "fold"] }
    step = [
        { use = "residuals" },
        { id = "rotate", use = "procrustes" },
        { id = "fold", use = "basis-fold" },
        { use = "fidelity" },
    ]
    """
    models = {"teacher": "teacher", "student": "student"}
    recipe = workspace.recipe(steps, observers=("report",), **models)
    outcome = workspace.run(recipe, [f"student.save_dtype={dtype}"])
    report = json.loads((outcome.folder / "report.json").read_text(encoding="utf-8"))
    assert set(report["figures"]) == {"base", "turned"}
    assert report["verdict"] == (
        f"Exact steps only: what differs from `base` is rounding of the {dtype} files."
    )
    [ablation] = report["ablations"]
    assert f"what changes is rounding of the {dtype} files; in float32 the KL" in ablation
