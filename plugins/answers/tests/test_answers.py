"""What variants say, beside the teacher's answers: known figures of known texts, and whole runs of pico models."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
from rotdistill_answers.step import Answers, compared, identifier, steps, words

from rotdistill_core.errors import RecipeError
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.plugin.step import stage_of
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.testing import pico_folder, pico_head, pico_texts, pico_tokenizer, run_recipe

ROOT = Path(__file__).parents[3]
ENGLISH = "The temple is one of the largest religious monuments in the world."
FRENCH = "Le temple est l'un des plus grands monuments religieux du monde."
RECIPE = (
    pico_head("said", "{work}/model", "{work}/model", tokens=6)
    + """
observers = []
student.save_dtype = "float32"
[[step]]
use = "chop"
layers = [0, 2]
[[step]]
use = "answers"
{options}
[variants]
whole = []
cut = ["chop"]
"""
)


def ran(work: Path, options: str = "") -> RunResult:
    pico_texts(work / "texts")
    pico_folder(work / "model", num_hidden_layers=3)
    path = work / "said.toml"
    path.write_text(RECIPE.format(work=work, options=options), encoding="utf-8")
    return run_recipe(path)


def language_of(text: str) -> str:
    return identifier(["en"])[1](text)


def test_answers_is_an_evaluator() -> None:
    assert steps() == [Answers]
    assert stage_of(Answers) == "evaluate"


def test_the_teachers_own_words_are_as_near_as_can_be() -> None:
    found = compared(FRENCH, FRENCH, "en", language_of)
    assert found == {
        "answer_chrf": pytest.approx(100), "answer_length": 1, "answer_length_gap": 0, "answer_language_teacher": 1, "answer_language": 0,
    }  # fmt: skip


def test_an_answer_in_another_language_is_told_from_the_question_and_from_the_teacher() -> None:
    found = compared(FRENCH, ENGLISH, "en", language_of)
    assert (found["answer_language"], found["answer_language_teacher"]) == (1, 0)
    assert 0 < found["answer_chrf"] < 50
    assert "answer_language" not in compared(FRENCH, ENGLISH, None, language_of)
    assert "answer_language_teacher" not in compared(", , ,", "; ; ;", "en", language_of)


@pytest.mark.parametrize(("times", "gap"), [(2, math.log(2)), (0.5, math.log(2)), (1, 0)])
def test_twice_and_half_the_length_are_equally_far(times: float, gap: float) -> None:
    found = compared("ab" * 10, "ab" * round(10 * times), None, language_of)
    assert (found["answer_length"], found["answer_length_gap"]) == (times, pytest.approx(gap))


def test_no_answer_at_all_has_finite_figures() -> None:
    found = compared(ENGLISH, "", "en", language_of)
    assert (found["answer_chrf"], found["answer_language"], found["answer_length_gap"]) == (
        0,
        0,
        pytest.approx(math.log(len(ENGLISH))),
    )


@pytest.mark.parametrize(
    ("file", "columns"), [("index.tsv", ("question", "blurb")), ("heldout.tsv", ("question",))]
)
def test_the_language_of_every_shipped_text_is_known(file: str, columns: tuple[str, ...]) -> None:
    with (ROOT / "samples" / file).open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    known, which = identifier(row["language"] for row in rows)
    assert {row["language"] for row in rows} <= known
    assert [
        row["id"]
        for row in rows
        if any(which(row[column]) != row["language"] for column in columns)
    ] == []


@pytest.mark.parametrize("text", ["", ", , , , ,", "1 2 3"])
def test_signs_are_in_no_language(text: str) -> None:
    assert language_of(text) == "und"


def test_languages_that_the_model_does_not_know_are_left_out() -> None:
    known, which = identifier(["fr", "xx"])
    assert "xx" not in known
    assert {"fr", "en"} <= known
    assert which(FRENCH) == "fr"


def test_words_leave_out_special_tokens() -> None:
    tokenizer = pico_tokenizer(64)
    tokens = tokenizer.convert_tokens_to_ids(["w1", "w2", "<end>"])
    assert words(tokenizer, tokens) == "w1 w2"


def test_the_uncut_student_says_what_its_teacher_says(tmp_path: Path) -> None:
    outcome = ran(tmp_path)
    whole = {(row.variant, row.metric): row for row in outcome.rows if row.text is None}
    assert (whole["whole", "answer_chrf"].value, whole["whole", "answer_length_gap"].value) == (
        pytest.approx(100),
        0,
    )
    assert whole["cut", "answer_chrf"].value < 90
    assert whole["cut", "answer_chrf"].n == 3
    for (variant, metric), row in whole.items():
        texts = [other for other in outcome.rows if other[:2] == (variant, metric) and other.text]
        assert [other.text for other in texts] == ["held-0", "held-1", "held-2"]
        assert sum(other.value for other in texts) / 3 == pytest.approx(row.value)
    said = outcome.steps["cut", "answers"].notes["answers"]
    assert said["held-1"]["question"].startswith("w")
    assert (
        said["held-1"]["teacher"]
        == outcome.steps["whole", "answers"].notes["answers"]["held-1"]["said"]
        != said["held-1"]["said"]
    )


def test_answers_are_given_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ran(tmp_path)
    monkeypatch.setattr("rotdistill_core.forward.generate.greedy_answers", None)
    again = ran(tmp_path)
    assert again.rows == first.rows
    assert again.steps["cut", "answers"].notes == first.steps["cut", "answers"].notes
    assert all(done.reused for done in again.steps.values())


def test_answers_may_be_cut_shorter(tmp_path: Path) -> None:
    outcome = ran(tmp_path, "tokens = 2")
    said = outcome.steps["whole", "answers"].notes["answers"].values()
    assert all(len(each["said"].split()) <= 2 for each in said)
    assert any(len(each["teacher"].split()) > 2 for each in said)


def test_an_answer_of_no_tokens_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "said.toml"
    path.write_text(RECIPE.format(work=tmp_path, options="tokens = 0"), encoding="utf-8")
    with pytest.raises(RecipeError, match="tokens"):
        load_recipe(path)
