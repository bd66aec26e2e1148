"""Which questions the teacher is asked: from forms and topics, balanced, in one fixed order."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

import rotdistill_core.data.lessons
from rotdistill_core.data.conversations import Conversation
from rotdistill_core.data.languages import NO_LANGUAGE
from rotdistill_core.data.lessons import (
    WINDOW,
    Candidate,
    LessonKind,
    LessonTexts,
    available,
    candidates,
    checked_lesson_texts,
    domain_of,
    lesson_notes,
    read_lesson_texts,
    shuffled_places,
)
from rotdistill_core.data.splits import Split
from rotdistill_core.errors import RecipeError
from rotdistill_core.recipe.document import Lessons, ModelRef, Recipe, StudentRef

FORMS = LessonTexts(forms=(("en", "Tell me about {topic}."), ("de", "Was ist {topic}?")))


def conversation(
    name: str, topic: str, language: str = "en", split: Split = Split.FIT, question: str = ""
) -> Conversation:
    return Conversation(name, language, split, question or f"What of {topic}?", "It is.", topic)


TEXTS = [
    *(conversation(f"e{k}", f"Town {k}") for k in range(9)),
    *(
        conversation(f"d{k}", f"Stadt {k}", "de", question=f"Ist Stadt {k} schön?")
        for k in range(3)
    ),
    conversation("v", "Valley", split=Split.VALIDATION),
    conversation("h", "Harbour", split=Split.HELDOUT),
]


def drawn(
    lessons: Lessons, count: int, seed: int = 0, texts: LessonTexts = FORMS
) -> list[Candidate]:
    return list(islice(candidates(domain_of(TEXTS, lessons, texts), lessons, seed), count))


def lessons(**options: object) -> Lessons:
    return Lessons.model_validate({"count": 100, "general": 0.0, **options})


def test_questions_are_forms_with_topics_to_fit_on() -> None:
    found = drawn(lessons(), 1000)
    topics = {f"Town {k}" for k in range(9)} | {f"Stadt {k}" for k in range(3)}
    assert {each.topic for each in found} == topics
    for each in found:
        assert each.topic in each.question
        assert each.kind == LessonKind.DOMAIN
    assert len({each.question for each in found}) == len(found)
    # Two English forms (one of them derived), two German ones, with twelve topics each.
    assert Counter(each.language for each in found) == {"en": 24, "de": 24}


def test_own_topics_come_before_borrowed_ones_and_given_forms_before_derived_ones() -> None:
    english = [each.question for each in drawn(lessons(), 1000) if each.language == "en"]
    groups = [
        ("Tell me about Town", 9),
        ("What of Town", 9),
        ("Tell me about Stadt", 3),
        ("What of Stadt", 3),
    ]
    for beginning, length in groups:
        assert all(question.startswith(beginning) for question in english[:length])
        english = english[length:]
    assert not english


def test_topics_of_no_language_are_own_topics_of_all() -> None:
    texts = LessonTexts(FORMS.forms, topics=(("de", "Dorf"), ("", "Fjord"), ("en", "Hamlet")))
    english = [each.topic for each in drawn(lessons(), 1000, texts=texts) if each.language == "en"]
    assert set(english[:-2]) == {"Fjord", "Hamlet"}
    assert english[-2:] == ["Dorf", "Dorf"]


def test_languages_and_general_share_are_balanced_in_every_beginning() -> None:
    found = drawn(lessons(general=0.4, **{"from": "teacher"}), 400)
    for length in range(10, 400, 7):
        beginning = found[:length]
        general = sum(each.kind != LessonKind.DOMAIN for each in beginning)
        assert general == int(0.4 * length)
        domain = Counter(each.language for each in beginning if each.kind == LessonKind.DOMAIN)
        assert abs(domain["en"] - 0.75 * (length - general)) <= 1
    assert {each.kind for each in found} == {LessonKind.DOMAIN, LessonKind.TEXT}
    assert {each.language for each in found if each.kind != LessonKind.DOMAIN} == {NO_LANGUAGE}


def test_a_longer_list_begins_with_the_shorter_one_and_a_seed_makes_another() -> None:
    assert drawn(lessons(count=5), 5) == drawn(lessons(count=40), 40)[:5]
    assert drawn(lessons(), 40, seed=1) != drawn(lessons(), 40, seed=2)


def test_a_name_in_another_script_is_asked_only_where_it_is_read() -> None:
    texts = [*TEXTS, conversation("z", "长城", "zh", question="长城有多长？")]
    forms = LessonTexts((*FORMS.forms, ("zh", "请介绍{topic}。")))
    found = candidates(domain_of(texts, lessons(), forms), lessons(), 0)
    asked = {(each.language, each.topic) for each in found}
    assert ("zh", "长城") in asked
    assert ("zh", "Town 3") in asked
    assert ("en", "长城") not in asked


def test_the_teacher_proposes_after_two_questions_of_the_language() -> None:
    for each in drawn(lessons(**{"from": "teacher"}), 30):
        assert each.question == ""
        assert len(each.examples) == 2
        by_language = {c.question for c in TEXTS if c.language == each.language}
        assert {question for question, _ in each.examples} <= by_language


def test_general_lessons_are_questions_if_asked_for_or_if_texts_are_of_no_use() -> None:
    domain = domain_of(TEXTS, lessons(), FORMS)
    questions = {"general": 0.5, "general_from": "questions"}
    for found in (
        candidates(domain, lessons(general=0.5), 0, texts=False),
        candidates(domain, lessons(**questions), 0),
    ):
        kinds = {each.kind for each in islice(found, 20)}
        assert kinds == {LessonKind.DOMAIN, LessonKind.GENERAL}


def test_forms_and_topics_are_read(tmp_path: Path) -> None:
    (tmp_path / "forms.tsv").write_bytes(
        "\ufefflanguage\tform\r\nEN\tTell me about {topic}.\r\n\r\n"
        "pt-BR\tO que é {topic}?\r\n".encode()
    )
    (tmp_path / "topics.txt").write_text("Rhubarb\n\nKohlrabi\tDE\n", encoding="utf-8")
    found = read_lesson_texts(lessons(forms="forms.tsv", topics="topics.txt"), tmp_path)
    assert found.forms == (("en", "Tell me about {topic}."), ("pt-BR", "O que é {topic}?"))
    assert found.topics == (("", "Rhubarb"), ("de", "Kohlrabi"))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("forms", "en Tell me about {topic}.", "line 1: needs the columns language, form"),
        ("forms", "en\tTell me about it.", "line 1: form: must hold {topic} once"),
        ("forms", "en\t{topic} or {topic}?", "line 1: form: must hold {topic} once"),
        ("forms", "\nEnglish\tWhat of {topic}?", "line 2: language: must be a code"),
        ("forms", "en\tWhat of\x07 {topic}?", "line 1: holds U+0007"),
        ("topics", "Rhubarb\ten\tmore", "line 1: needs the columns topic, language"),
        ("topics", "Rhubarb\tEnglish", "line 1: language: must be a code"),
        ("topics", "...", "line 1: topic: ... has no letter"),
        ("topics", "Rhubarb\x00", "line 1: holds U+0000"),
    ],
)
def test_bad_files_are_refused_with_file_and_line(
    tmp_path: Path, name: str, content: str, problem: str
) -> None:
    path = tmp_path / "file.tsv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        read_lesson_texts(lessons(**{name: "file.tsv"}), tmp_path)
    assert f"{path}: {problem}" in str(error.value)


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "wide.tsv").write_bytes("en\t{topic}?".encode("utf-16"))
    for name, reason in (("gone.tsv", "cannot be read"), ("wide.tsv", "UTF-16")):
        with pytest.raises(RecipeError, match=reason):
            read_lesson_texts(lessons(forms=name), tmp_path)


def recipe(**options: object) -> Recipe:
    ref = {"model": "m"}
    return Recipe(
        name="r",
        teacher=ModelRef(**ref),
        student=StudentRef(**ref),
        lessons=lessons(**options),
    )


def test_no_file_is_read_without_lessons(tmp_path: Path) -> None:
    assert checked_lesson_texts(recipe(count=0, forms="gone.tsv"), tmp_path, TEXTS) == LessonTexts()


def test_lessons_without_any_question_are_refused(tmp_path: Path) -> None:
    texts = [Conversation("a", "en", Split.FIT, "What is it?", "It is.")]
    with pytest.raises(RecipeError, match="makes no question: the texts to fit on have 0 topics"):
        checked_lesson_texts(recipe(), tmp_path, texts)


def test_a_count_that_cannot_be_reached_is_told() -> None:
    assert available(domain_of(TEXTS, lessons(), FORMS), lessons()) == 48
    (note,) = lesson_notes(recipe(), TEXTS, FORMS)
    assert note.startswith("lessons: 48 of the 100 ")
    assert lesson_notes(recipe(count=48), TEXTS, FORMS) == []


@pytest.mark.parametrize("general", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("wanted", [1, 48, 60, 300])
def test_as_many_are_available_as_are_drawn(general: float, wanted: int) -> None:
    options = lessons(count=wanted, general=general)
    drawn_ones = drawn(options, wanted)
    assert available(domain_of(TEXTS, options, FORMS), options) == len(drawn_ones)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 64, 65, 1000])
def test_places_are_shuffled_without_a_list(size: int) -> None:
    found = list(shuffled_places(size, "key"))
    assert sorted(found) == list(range(size))
    if size > 3:
        assert found not in (list(range(size)), list(shuffled_places(size, "another")))


def many(count: int) -> list[Conversation]:
    """Return texts whose questions are as many forms as there are topics."""
    return [
        conversation(f"m{k}", f"Town {k}", question=f"What is {k} to Town {k} of all?")
        for k in range(count)
    ]


def test_the_first_of_a_hundred_million_questions_is_drawn_without_the_others() -> None:
    options = lessons(count=1_000_000)
    domain = domain_of(many(10_000), options, FORMS)
    assert available(domain, options) == 1_000_000
    found = list(islice(candidates(domain, options, 0), 10_200))
    # One given form with each topic, then derived ones of which every form and topic is another.
    assert len({each.topic for each in found[:10_000]}) == 10_000
    assert all(each.question.startswith("Tell me about") for each in found[:10_000])
    derived = found[10_000:]
    assert len({each.question for each in derived}) == 200
    assert len({each.topic for each in derived}) > 180
    assert found == list(islice(candidates(domain, options, 0), 10_200))


def test_examples_of_many_questions_are_chosen_among_a_thousand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = lessons(**{"from": "teacher"})
    domain = domain_of(many(5_000), options, FORMS)
    hashed = []
    hash_of = rotdistill_core.data.lessons._hash
    monkeypatch.setattr(
        "rotdistill_core.data.lessons._hash", lambda *key: hashed.append(key) or hash_of(*key)
    )
    found = list(islice(candidates(domain, options, 0), 20))
    assert len(hashed) == 20 * (WINDOW + 1)
    assert len({each.examples for each in found}) == 20
