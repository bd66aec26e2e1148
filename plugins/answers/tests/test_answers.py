"""Answers of variants next to the teacher's: figures of known texts, and runs of pico models."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from rotdistill_answers._method import (
    MOST_REPEATED,
    UNKNOWN,
    AnswerScore,
    Figure,
    LanguageIdentifier,
    claim_figures,
    decode_answer,
    of_teacher,
    repeated_share,
    repetition,
    score_answer,
    similarity,
)
from rotdistill_answers._normalize import normalize
from rotdistill_answers.step import Answers, steps

from rotdistill_core.data.conversations import Claim, Conversation
from rotdistill_core.data.splits import Split
from rotdistill_core.data.tokenization import answer_after_thoughts
from rotdistill_core.errors import RecipeError
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.plugin.step import stage_of
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.store.results import Answer
from rotdistill_core.testing import (
    STEP_CHECKS,
    PicoWorkspace,
    parametrize_with_checks,
    pico_tokenizer,
)

ROOT = Path(__file__).parents[3]
ENGLISH = "The temple is one of the largest religious monuments in the world."
FRENCH = "Le temple est l'un des plus grands monuments religieux du monde."
QUESTION = Conversation(
    "held-0",
    "en",
    Split.HELDOUT,
    "What is it?",
    None,
    facts=(Claim("a temple", ("temple",)), Claim("in Cambodia", ("Cambodia", "Cambodge"))),
    falsehoods=(Claim("a church", ("church", "eglise")),),
)
STEPS = """
variants = { whole = [], cut = ["chop"] }
student.save_dtype = "float32"
step = [
    { use = "chop", layers = [0, 2] },
    { use = "answers" },
]
"""


# Pico texts have no questions, so the checks that run the step do not hold.
@parametrize_with_checks(Answers, {}, {"max_tokens": 3}, checks=STEP_CHECKS[:2])
def test_answers_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


@pytest.fixture
def workspace(pico_workspace: PicoWorkspace) -> PicoWorkspace:
    """Return a workspace with a model of three layers."""
    pico_workspace.model(num_hidden_layers=3)
    return pico_workspace


def run(workspace: PicoWorkspace, *sets: str) -> RunResult:
    return workspace.run(workspace.recipe(STEPS, answer_tokens=6), sets)


def answers_of(result: RunResult, variant: str) -> dict[str, Answer]:
    return result.steps[variant, "answers"].report.answers


@cache
def english() -> LanguageIdentifier:
    return LanguageIdentifier(["en"])


def score(answer: str) -> AnswerScore:
    return score_answer(answer, QUESTION, english())


def figures_of(student: str, teacher: str, asked_language: str | None = "en") -> dict[str, float]:
    figures = similarity(score(student), score(teacher), asked_language)
    return {metric: figure.value for metric, figure in figures.items()}


def test_answers_is_an_evaluator() -> None:
    assert steps() == [Answers]
    assert stage_of(Answers) == "evaluate"


def test_an_answer_is_scored_by_its_claims_and_its_language() -> None:
    assert score(ENGLISH) == (ENGLISH, "en", ("a temple",), ())
    assert score("This church is in Cambodia.")[2:] == (("in Cambodia",), ("a church",))


def test_an_answer_in_another_language_is_read_with_its_own_denials() -> None:
    answer = "Ce n'est pas une église, c'est un temple du Cambodge."
    assert score(answer) == (answer, "fr", ("a temple", "in Cambodia"), ())


def test_an_answer_in_no_language_is_read_as_the_question() -> None:
    assert score("1889")[1:] == (UNKNOWN, (), ())


def test_claims_become_figures_with_their_number_as_weight() -> None:
    stated = AnswerScore("", "en", facts=("a temple",), errors=("a church",))
    assert of_teacher(claim_figures(stated, QUESTION)) == {
        "factual_completeness_teacher": Figure(0.5, n=2),
        "hallucination_rate_teacher": Figure(1.0, n=1),
    }
    bare = Conversation("held-1", "en", Split.HELDOUT, "?", None)
    assert claim_figures(stated, bare) == {}


def test_the_teachers_answer_is_as_similar_as_can_be() -> None:
    assert figures_of(FRENCH, FRENCH) == {
        "answer_chrf": pytest.approx(100),
        "answer_length": 1,
        "answer_length_gap": 0,
        "answer_language": 0,
        "answer_language_teacher": 1,
    }


@pytest.mark.parametrize(
    ("answer", "repeats"),
    [
        ("I'm sorry for the customer's trip. I'm sorry for the customer's trip. I'm sorry", 1),
        ("I can't give you a refund for it. " + "I'm sorry. " * 5, 1),
        ("I can't give you a refund for it. " + "I'm sorry. " * 2, 0),
        ("Bekimme:\n\nBekimme:\n\nBekimme:\n\nBekimme:", 1),
        ("この塔はとても高い。この塔はとても高い。この塔はとても高い。", 1),
        ("هذا هو البرج. هذا هو البرج. هذا هو البرج.", 1),
        (ENGLISH, 0),
        (FRENCH, 0),
        ("Yes.", 0),
        ("", 0),
    ],
)
def test_an_answer_that_runs_in_circles_repeats_itself_in_any_script(
    answer: str, repeats: float
) -> None:
    assert repetition(answer) == {"answer_repeats": Figure(repeats)}


def test_no_shipped_text_repeats_itself() -> None:
    with (ROOT / "samples/index.tsv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert max(repeated_share(row["blurb"]) for row in rows) < 0.05 < MOST_REPEATED


def test_an_answers_language_is_compared_with_question_and_teacher() -> None:
    figures = figures_of(ENGLISH, FRENCH)
    assert (figures["answer_language"], figures["answer_language_teacher"]) == (1, 0)
    assert 0 < figures["answer_chrf"] < 50


def test_a_language_that_is_unknown_has_no_figure() -> None:
    assert "answer_language" not in figures_of(ENGLISH, FRENCH, asked_language=None)
    assert "answer_language_teacher" not in figures_of("; ; ;", ", , ,")


@pytest.mark.parametrize(("times", "gap"), [(2, math.log(2)), (0.5, math.log(2)), (1, 0)])
def test_twice_and_half_the_length_are_equally_far(times: float, gap: float) -> None:
    figures = figures_of("ab" * round(10 * times), "ab" * 10)
    assert (figures["answer_length"], figures["answer_length_gap"]) == (times, pytest.approx(gap))


def test_an_empty_answer_has_finite_figures() -> None:
    figures = figures_of("", ENGLISH)
    assert figures["answer_chrf"] == 0
    assert figures["answer_language"] == 0
    assert figures["answer_length_gap"] == pytest.approx(math.log(len(ENGLISH)))


@pytest.mark.parametrize(
    ("file", "columns"), [("index.tsv", ("question", "blurb")), ("heldout.tsv", ("question",))]
)
def test_the_language_of_every_shipped_text_is_known(file: str, columns: tuple[str, ...]) -> None:
    with (ROOT / "samples" / file).open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    identifier = LanguageIdentifier(row["language"] for row in rows)
    assert {row["language"] for row in rows} <= identifier.languages
    wrong = [
        row["id"]
        for row in rows
        for column in columns
        if identifier.language_of(row[column]) != row["language"]
    ]
    assert wrong == []


@pytest.mark.parametrize("text", ["", ", , , , ,", "1 2 3"])
def test_signs_are_in_no_language(text: str) -> None:
    assert english().language_of(text) == UNKNOWN


def test_languages_that_the_model_does_not_know_are_left_out() -> None:
    identifier = LanguageIdentifier(["fr", "xx"])
    assert "xx" not in identifier.languages
    assert {"fr", "en"} <= identifier.languages
    assert identifier.language_of(FRENCH) == "fr"


def test_decoded_answers_have_no_special_tokens() -> None:
    tokenizer = pico_tokenizer(64)
    tokens = tokenizer.convert_tokens_to_ids(["w1", "w2", "<end>"])
    assert decode_answer(tokenizer, tokens) == "w1 w2"


def test_marks_of_thoughts_stay_also_where_they_are_special_tokens() -> None:
    tokenizer = pico_tokenizer(64, thinks=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    prompt = tokenizer("<user> w9 <end> <assistant> <think>")["input_ids"]
    whole = decode_answer(tokenizer, tokenizer("w1 w2 </think> w3 w4 <end>")["input_ids"])
    assert whole == "w1 w2</think>w3 w4"
    assert answer_after_thoughts(tokenizer, prompt, whole) == "w3 w4"
    assert answer_after_thoughts(tokenizer, prompt, "w1 w2") == ""
    assert answer_after_thoughts(tokenizer, prompt[:-1], "w1 w2") == "w1 w2"


def test_thoughts_are_kept_and_not_scored(
    workspace: PicoWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = pico_tokenizer(64, thinks=True)
    tokenizer.save_pretrained(workspace.folder / "model")
    lines = [{"id": f"held-{k}", "answer": "<think> w4 </think> w5 w6"} for k in range(3)]
    (workspace.folder / "made.jsonl").write_text("\n".join(map(json.dumps, lines)))
    said = {
        "held-0": "w7 w8 w9 </think> w5 w6",
        "held-1": "w4 </think> w9 w10",
        "held-2": "w4 w5 w6",
    }
    tokens = {name: tokenizer(f"{text} <end>")["input_ids"] for name, text in said.items()}
    generated = SimpleNamespace(tokens=tokens)
    monkeypatch.setattr("rotdistill_answers._method.kept_answers", lambda *_: generated)
    tables = 'samples.thinking = true\nengine = { use = "file", path = "made.jsonl" }'
    result = workspace.run(workspace.recipe(STEPS, answer_tokens=9, tables=tables))
    chrf = {row.text: row.value for row in result.rows if row[:2] == ("cut", "answer_chrf")}
    assert chrf["held-0"] == pytest.approx(100)
    assert chrf["held-1"] < 60
    assert chrf["held-2"] == 0
    step = result.steps["cut", "answers"]
    assert step.notes["answers that end inside their thoughts, scored as empty"] == {
        "teacher": 0,
        "student": 1,
    }
    assert {name: each.student for name, each in step.report.answers.items()} == said
    assert {each.teacher for each in step.report.answers.values()} == {"w4 </think> w5 w6"}


@pytest.mark.slow
def test_the_uncut_student_answers_as_its_teacher(workspace: PicoWorkspace) -> None:
    result = run(workspace)
    means = {(row.variant, row.metric): row for row in result.rows if row.text is None}
    assert means["whole", "answer_chrf"].value == pytest.approx(100)
    assert means["whole", "answer_length_gap"].value == 0
    assert means["cut", "answer_chrf"].value < 90
    assert means["cut", "answer_chrf"].n == 3
    for (variant, metric), mean in means.items():
        rows = [row for row in result.rows if row[:2] == (variant, metric) and row.text]
        assert [row.text for row in rows] == ["held-0", "held-1", "held-2"]
        assert sum(row.value for row in rows) / 3 == pytest.approx(mean.value)
    cut, whole = answers_of(result, "cut")["held-1"], answers_of(result, "whole")["held-1"]
    assert cut.question.startswith("w")
    assert cut.teacher == whole.student != cut.student


def test_answers_are_generated_once(
    workspace: PicoWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(workspace)
    with monkeypatch.context() as patch:
        patch.setattr("rotdistill_answers._method.kept_answers", None)
        again = run(workspace)
        assert again.rows == first.rows
        assert answers_of(again, "cut") == answers_of(first, "cut") != {}
        assert all(step.reused for step in again.steps.values())
    # A run that has lost files makes them again, those too that only save work after a kill.
    shutil.rmtree(first.folder / "answers" / "variant-cut")
    healed = run(workspace)
    assert healed.rows == first.rows
    made = {key for key, step in healed.steps.items() if not step.reused}
    assert made == {("cut", "answers")}
    assert (first.folder / "answers" / "variant-cut").is_dir()


def test_answers_can_be_shorter_than_the_teachers(workspace: PicoWorkspace) -> None:
    answers = answers_of(run(workspace, "answers.max_tokens=2"), "whole").values()
    assert all(len(answer.student.split()) <= 2 for answer in answers)
    assert any(len(answer.teacher.split()) > 2 for answer in answers)


def test_an_answer_of_no_tokens_is_refused(tmp_path: Path) -> None:
    recipe = PicoWorkspace(tmp_path).recipe(STEPS)
    with pytest.raises(RecipeError, match="max_tokens"):
        load_recipe(recipe, ["answers.max_tokens=0"])


@pytest.mark.parametrize(
    "language", ["pt-BR", "zh-Hant-TW", "xx", "zzz-Latn", "EN", "12", "q!", ""]
)
def test_a_language_of_any_code_ends_no_run(language: str) -> None:
    text = "Em 12 May 1900 custou 3 million km"
    assert normalize(text, language)
    assert LanguageIdentifier([language]).languages >= {"pt", "en"}


def test_the_model_of_languages_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = LanguageIdentifier(["sw"])
    monkeypatch.setattr("rotdistill_answers._method.LangidModel", None)
    again = LanguageIdentifier(["sw-KE"])
    assert again.languages == first.languages
    assert again.language_of(FRENCH) == "fr"


def test_a_language_tag_is_read_as_its_language() -> None:
    for text in ("a 14 de julho de 1789", "vinte e três", "3,2 milhões"):
        assert normalize(text, "pt-BR") == normalize(text, "pt") != normalize(text, "xx")
    assert "sw" in LanguageIdentifier(["sw-KE"]).languages
