"""Templates and tokenizers meet the texts before any model computes, in `plan` as in `run`."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rotdistill_core.data.chat import ChatFormat
from rotdistill_core.errors import RecipeError
from rotdistill_core.planning import chats as chats_module
from rotdistill_core.planning.chats import planned_date, position_limit
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.store.ledger import Ledger
from rotdistill_core.testing import PicoWorkspace, pico_tokenizer
from rotdistill_core.testing.pico import TEMPLATE

STEPS = 'variants = { base = [] }\nstep = [{ use = "residuals" }, { use = "fidelity" }]'
DATED = "w{{ strftime_now('%d') | int }} w{{ strftime_now('%M') | int }} " + TEMPLATE
OTHER = "{% for m in messages %}<system> w1 {{ m.content }} <end> {% endfor %}"
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
)


class Clock(datetime.date):
    """A day that tests set."""

    day_of_test = datetime.date(2025, 7, 1)

    @classmethod
    def today(cls) -> Any:
        return cls.day_of_test


@pytest.fixture
def set_day(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that sets the day of runs."""
    monkeypatch.setattr(chats_module.datetime, "date", Clock)

    def on(day: str) -> None:
        monkeypatch.setattr(Clock, "day_of_test", datetime.date.fromisoformat(day))

    return on


def put_template(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def change(path: Path, **values: object) -> None:
    """Change keys of a JSON object; None takes a key away."""
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.fixture
def work(pico_workspace: PicoWorkspace) -> PicoWorkspace:
    pico_workspace.recipe(STEPS)
    return pico_workspace


def both(work: PicoWorkspace, code: int) -> list[str]:
    """Return what `plan` and `run` say; both end with a code."""
    said = []
    for words in (("plan", "trial.toml"), ("run", "trial.toml", "--no-plan")):
        found, out, err = work.command(*words)
        assert found == code, err
        assert "should not happen" not in err
        said.append(" ".join((out + err).split()))
    return said


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize(
    ("template", "message"),
    [
        (" ", "is no text, or a blank one"),
        ("{% for m in messages %}{{ m.content ", "TemplateSyntaxError"),
        ("{{ who.is.this }}", "UndefinedError: 'who' is undefined"),
        ("w1", "writes every question alike"),
        (TEMPLATE + "{{ range(10 ** 4) | random }}", "writes another text each time"),
        ("{% set n = namespace(_a=1) %}" + TEMPLATE, "SecurityError: the attribute '_a'"),
        (TEMPLATE + "{{ messages[2].content.x.y if messages | length > 2 }}", "UndefinedError"),
    ],
)
def test_a_template_that_fails_ends_plan_and_run_with_3(
    work: PicoWorkspace, role: str, template: str, message: str
) -> None:
    # With a vocabulary of its own the student needs its own template.
    other = work.model("other", vocab_size=56)
    put_template(other, template)
    work.recipe('step = [{ use = "chop", layers = 1 }]', **{role: "other"})
    for said in both(work, 3):
        assert message in said
        assert "other: " in said


@pytest.mark.parametrize("use", ["lm-head-ridge", "prompt-kl", "writer-refit"])
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_steps_that_compare_logits_refuse_two_vocabularies_before_any_work(
    work: PicoWorkspace, role: str, use: str
) -> None:
    work.model("other", vocab_size=56)
    work.recipe(f'step = [{{ use = "{use}" }}]', **{role: "other"})
    for said in both(work, 3):
        assert "have different tokenizers: " in said
    assert not work.runs.exists()


def test_a_token_without_a_row_is_named(work: PicoWorkspace) -> None:
    tokenizer: Any = pico_tokenizer(64)
    tokenizer.add_tokens(["<turn>"], special_tokens=True)
    tokenizer.chat_template = TEMPLATE.replace("<{{ m.role }}>", "<turn> {{ m.role }}")
    tokenizer.save_pretrained(work.folder / "model")
    for said in both(work, 3):
        assert "token 64" in said


def test_an_end_token_without_a_row_is_named(work: PicoWorkspace) -> None:
    change(work.folder / "model/tokenizer_config.json", eos_token="<fin/é>")
    for said in both(work, 3):
        assert "token 64" in said


def test_without_a_system_role_plan_and_run_say_where_the_prompt_goes(work: PicoWorkspace) -> None:
    put_template(work.folder / "model", NO_SYSTEM)
    for said in both(work, 0):
        assert "its chat template has no system role; the system prompt goes before" in said
    [folder] = work.runs.iterdir()
    rows = (folder / "samples.tsv").read_text().splitlines()
    assert len(rows) == 24


@pytest.mark.parametrize(
    "tokens",
    [
        {"extra_special_tokens": {"image_token": "<end>"}},
        {"model_specific_special_tokens": {"image_token": "<end>"}},
        {"image_token": "<end>"},
    ],
)
def test_tokens_that_a_model_names_itself_are_known_to_plan(
    work: PicoWorkspace, tokens: dict[str, Any]
) -> None:
    put_template(work.folder / "model", "{{ image_token + ' ' }}" + TEMPLATE)
    change(work.folder / "model/tokenizer_config.json", **tokens)
    both(work, 0)


def test_plan_refuses_no_token_that_only_a_class_of_transformers_names(
    work: PicoWorkspace,
) -> None:
    put_template(work.folder / "model", "{{ bos_token + ' ' }}" + DATED)
    change(work.folder / "model/tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    code, _, err = work.command("plan", "trial.toml")
    assert code == 0, err
    change(work.folder / "model/tokenizer_config.json", tokenizer_class="TokenizersBackend")
    code, _, err = work.command("plan", "trial.toml")
    assert code == 3
    assert "'bos_token' is undefined" in " ".join(err.split())


def test_the_date_counts_where_only_transformers_knows_the_rest(tmp_path: Path) -> None:
    assert planned_date(tmp_path, None, "2025-07-01") == ""
    put_template(tmp_path, "{{ bos_token + ' ' }}" + DATED)
    assert planned_date(tmp_path, None, "2025-07-01") == "2025-07-01"
    put_template(tmp_path, "{{ bos_token + ' ' }}" + TEMPLATE)
    assert planned_date(tmp_path, None, "2025-07-01") == ""


def test_answers_without_an_end_are_announced(work: PicoWorkspace) -> None:
    model = work.folder / "model"
    change(model / "tokenizer_config.json", eos_token=None)
    change(model / "config.json", eos_token_id=None)
    change(model / "generation_config.json", eos_token_id=None)
    for said in both(work, 0):
        assert "names no token that ends an answer" in said


def test_texts_beyond_the_length_of_a_model_are_cut_or_refused(work: PicoWorkspace) -> None:
    change(work.folder / "model/config.json", max_position_embeddings=24)
    for said in both(work, 0):
        assert "20 texts" in said
        assert "cut after 24 tokens" in said
    change(work.folder / "model/config.json", max_position_embeddings=16)
    for said in both(work, 2):
        assert (
            "text held-0: its prompt has 14 tokens; with an answer of up to 4 it passes 16" in said
        )


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused_by_plan_as_by_run(
    work: PicoWorkspace,
) -> None:
    work.recipe(STEPS, tables="samples.max_tokens = 16")
    (index,) = work.folder.rglob("index.tsv")
    header, first, *others = index.read_text(encoding="utf-8").split("\n")
    cells = first.split("\t")
    cells[header.split("\t").index("question")] += " w1" * 20
    index.write_text("\n".join([header, "\t".join(cells), *others]), encoding="utf-8")
    for said in both(work, 3):
        assert "its prompt alone has" in said
        assert "texts are cut after 16. Raise samples.max_tokens" in said


def test_a_prompt_beyond_what_a_model_was_made_for_is_refused_by_plan_as_by_run(
    work: PicoWorkspace,
) -> None:
    work.recipe(STEPS)  # max_tokens is 512, the model's limit 128
    (index,) = work.folder.rglob("index.tsv")
    header, first, *others = index.read_text(encoding="utf-8").split("\n")
    cells = first.split("\t")
    cells[header.split("\t").index("question")] += " w1" * 128
    index.write_text("\n".join([header, "\t".join(cells), *others]), encoding="utf-8")
    for said in both(work, 3):
        assert "texts are cut after 128" in said


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({}, 64),
        ({"rope_type": "default", "rope_theta": 1e4}, 64),
        ({"rope_type": "yarn", "factor": 4.0}, None),
        ({"type": "linear", "factor": 2.0}, None),
        ({"full_attention": {"rope_type": "dynamic", "factor": 2.0}}, None),
        (1, None),
        (["yarn"], None),
    ],
)
def test_scaled_tables_have_no_limit(rope: Any, limit: int | None) -> None:
    assert position_limit({"max_position_embeddings": 64, "rope_parameters": rope}) == limit
    assert position_limit({"rope_scaling": rope}) is None


def test_a_tokenizer_that_loses_texts_is_told(work: PicoWorkspace) -> None:
    path = work.folder / "texts/style.md"
    path.write_text("w1 Größe w2")
    code, _, err = work.command("run", "trial.toml")
    assert code == 0
    assert "does not give back 1 of 24 texts, the system prompt the first" in " ".join(err.split())


# The date.


def dates(work: PicoWorkspace) -> list[str]:
    return [s.inputs["date"] for f in sorted(work.runs.iterdir()) for s in Ledger(f).starts]


def reused(work: PicoWorkspace, *words: str) -> set[bool]:
    code, out, err = work.command("plan", "trial.toml", "--json", *words)
    assert code == 0, err
    return {line["reused"] for line in json.loads(out)["steps"]}


def test_a_run_keeps_its_date_until_a_fresh_one(
    work: PicoWorkspace, set_day: Callable[[str], None]
) -> None:
    put_template(work.folder / "model", DATED)
    set_day("2025-07-01")
    assert reused(work) == {False}
    work.run(work.folder / "trial.toml")
    first = [folder.name for folder in work.runs.iterdir()]
    set_day("2025-07-02")
    assert reused(work) == {True}
    again = work.run(work.folder / "trial.toml")
    assert all(step.reused for step in again.steps.values())
    assert dates(work) == ["2025-07-01"]
    assert [folder.name for folder in work.runs.iterdir()] == first
    work.run(work.folder / "trial.toml", fresh=True)
    assert dates(work) == ["2025-07-01", "2025-07-02"]
    set_day("2025-07-03")
    assert reused(work) == {True}


def test_another_recipe_of_these_texts_has_the_same_date(
    work: PicoWorkspace, set_day: Callable[[str], None]
) -> None:
    put_template(work.folder / "model", DATED)
    set_day("2025-07-01")
    work.run(work.folder / "trial.toml")
    set_day("2025-07-02")
    other = work.run(work.folder / "trial.toml", ["name=second"])
    assert other.steps["base", "residuals"].reused
    assert set(dates(work)) == {"2025-07-01"}


@pytest.mark.parametrize("written", ['"2024-02-29"', "2024-02-29"])
def test_a_recipe_may_name_the_date(
    work: PicoWorkspace, set_day: Callable[[str], None], written: str
) -> None:
    put_template(work.folder / "model", DATED)
    set_day("2025-07-01")
    work.run(work.folder / "trial.toml", [f"samples.date={written}"])
    assert dates(work) == ["2024-02-29"]
    set_day("2025-07-02")
    assert reused(work, "--set", f"samples.date={written}") == {True}


@pytest.mark.parametrize("written", ["tomorrow", "2025-13-01", "3", "2025-07-01T10:00:00"])
def test_a_date_that_is_none_is_refused(work: PicoWorkspace, written: str) -> None:
    with pytest.raises(RecipeError, match=r"samples\.date: "):
        load_recipe(work.folder / "trial.toml", [f"samples.date={written}"])


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_the_line_on_the_date_names_whose_template_writes_it(
    work: PicoWorkspace, role: str
) -> None:
    put_template(work.model("other", vocab_size=56), DATED)
    work.recipe('step = [{ use = "chop", layers = 1 }]', **{role: "other"})
    for said in both(work, 0):
        assert "other: its chat template writes the date; this run has " in said
        assert "model: its chat template writes" not in said


def test_a_template_without_a_date_has_none(
    work: PicoWorkspace, set_day: Callable[[str], None]
) -> None:
    work.run(work.folder / "trial.toml")
    set_day("2099-01-01")
    assert reused(work) == {True}
    [folder] = work.runs.iterdir()
    assert "date" not in Ledger(folder).starts[0].inputs


# The student's template.


@pytest.mark.parametrize("template", [OTHER, None], ids=["another", "none"])
def test_a_checkpoint_has_the_template_of_its_texts(
    work: PicoWorkspace, template: str | None
) -> None:
    student = work.model("student", seed=3)
    if template:
        put_template(student, template)
    else:
        (student / "chat_template.jinja").unlink()
    work.recipe(STEPS, student="student")
    for said in both(work, 0):
        assert "the student's chat template is not the teacher's" in said
    [saved] = work.runs.glob("*/checkpoints/base")
    assert (saved / "chat_template.jinja").read_text() == TEMPLATE
    loaded = AutoTokenizer.from_pretrained(saved)
    teacher = AutoTokenizer.from_pretrained(work.folder / "model")
    assert ChatFormat.of(loaded).same_texts(ChatFormat.of(teacher))


@pytest.mark.parametrize("vocabulary", [64, 56])
def test_a_student_with_its_own_format_keeps_its_tokenizer(
    work: PicoWorkspace, vocabulary: int
) -> None:
    student = work.model("student", seed=3, vocab_size=vocabulary)
    if vocabulary != 64:
        put_template(student, OTHER)
    change(student / "tokenizer_config.json", model_max_length=77)
    work.recipe('step = [{ use = "chop", layers = 1 }]', student="student")
    for said in both(work, 0):
        assert "the student's chat template" not in said
    [saved] = work.runs.glob("*/checkpoints/full")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        assert (saved / name).read_bytes() == (student / name).read_bytes()
