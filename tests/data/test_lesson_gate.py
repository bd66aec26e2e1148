"""No lesson is about what is held out, none comes twice, and none is no question."""

from __future__ import annotations

import unicodedata

import pytest

from rotdistill_core.data.conversations import Conversation, Turn
from rotdistill_core.data.lesson_gate import Gate, Reason, one_line
from rotdistill_core.data.lessons import Candidate, LessonKind
from rotdistill_core.data.splits import Split

TEXTS = [
    Conversation(
        "f", "en", Split.FIT, "What makes Pompeii special?", "Ash kept its towers.", "Pompeii"
    ),
    Conversation("v", "en", Split.VALIDATION, "Is Bagan large?", "It is.", "Bagan"),
    Conversation("h", "es", Split.HELDOUT, "¿Qué es la Torre de Belém?", None, "Belém Tower"),
    Conversation("g", "en", Split.GUARD, "", "Two members voted against it on Tuesday."),
]
FORMED = Candidate(0, LessonKind.DOMAIN, "en", question="?")
PROPOSED = Candidate(0, LessonKind.DOMAIN, "en")
GENERAL = Candidate(0, LessonKind.GENERAL, "und")
TEXT = Candidate(0, LessonKind.TEXT, "und")


@pytest.fixture
def gate() -> Gate:
    return Gate.of(TEXTS, ["Tell me about {topic}."])


@pytest.mark.parametrize(
    "question",
    [
        "Tell me about Belém Tower.",
        "Tell me about BELEM TOWER.",
        unicodedata.normalize("NFD", "Is Belém nice?"),
        "Is the belem-tower old?",
        "¿Cuándo abre la torre de belém?",
    ],
)
@pytest.mark.parametrize("candidate", [FORMED, PROPOSED, GENERAL, TEXT])
def test_a_held_out_topic_in_a_question_excludes_it(
    gate: Gate, candidate: Candidate, question: str
) -> None:
    assert not gate.admits(candidate, question)
    assert gate.dropped == {Reason.HELDOUT_QUESTION: 1}
    assert gate.examples[Reason.HELDOUT_QUESTION] == [question]


def test_a_held_out_topic_in_an_answer_excludes_it(gate: Gate) -> None:
    assert not gate.admits_answer("What is in Lisbon?", "See the tower of BELÉM.")
    assert gate.examples[Reason.HELDOUT_ANSWER] == ["What is in Lisbon? (belem)"]
    assert not gate.admits_answer("What is in Porto?", "  ")
    assert gate.admits_answer("What is in Porto?", "Wine cellars.")


def test_topics_that_options_are_chosen_on_are_not_asked_about(gate: Gate) -> None:
    assert not gate.admits(FORMED, "Tell me about Bagan.")
    assert gate.dropped == {Reason.VALIDATION: 1}
    assert gate.admits(GENERAL, "How do I travel to Bagan by ship?")


def test_what_was_asked_is_not_asked_again(gate: Gate) -> None:
    assert not gate.admits(FORMED, "what makes POMPEII special")
    assert gate.admits(FORMED, "Tell me about Pompeii.")
    assert not gate.admits(FORMED, "Tell me about Pompeii!")
    assert gate.dropped == {Reason.REPEATED: 2}


def test_forms_with_other_topics_are_alike_and_proposals_are_not(gate: Gate) -> None:
    assert gate.admits(FORMED, "Tell me about Petra's cousin Rome 1.")
    assert gate.admits(FORMED, "Tell me about Petra's cousin Rome 2.")
    assert not gate.admits(PROPOSED, "Tell me about Petra's cousin Rome 3.")
    assert not gate.admits(TEXT, "Two members voted against it on Tuesdays.")
    assert gate.dropped == {Reason.NEAR: 2}


def test_a_few_examples_are_kept_for_each_reason(gate: Gate) -> None:
    for number in range(9):
        assert not gate.admits(FORMED, f"Tell me about Bagan {number}.")
    assert gate.dropped[Reason.VALIDATION] == 9
    assert len(gate.examples[Reason.VALIDATION]) == 3


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("What is this?\nAnd more", "What is this?"),
        ("\n  Where is it now?  ", "Where is it now?"),
        ("???", ""),
        ("", ""),
        ("a" * 301, ""),
        ("What is \x07this thing?", ""),
        ("這座城有什麼特別？", "這座城有什麼特別？"),
    ],
)
def test_a_proposed_question_is_one_line(text: str, question: str) -> None:
    assert one_line(text) == question


@pytest.mark.parametrize(
    ("language", "question", "admitted"),
    [
        ("en", "Which mill is that", False),
        ("en", "Which mill is that?", True),
        ("el", "Πού είναι ο μύλος;", True),
        ("en", "A mill; a white horse", False),
        ("ja", "風車はどこにありますか", True),
        ("zh", "风车到底在哪里？", True),
    ],
)
def test_a_proposed_question_has_a_mark_where_those_of_the_index_have_one(
    language: str, question: str, admitted: bool
) -> None:
    asked = {"en": "Why?", "el": "Γιατί;", "ja": "なぜですか", "zh": "为什么？"}
    texts = [Conversation(code, code, Split.FIT, text, "x") for code, text in asked.items()]
    gate = Gate.of(texts, [])
    assert gate.admits(Candidate(0, LessonKind.DOMAIN, language), question) == admitted
    assert gate.dropped == ({} if admitted else {Reason.NO_MARK: 1})
    # Forms are the user's own, and general questions need none.
    assert gate.admits(Candidate(1, LessonKind.GENERAL, "und"), f"{question} indeed")
    assert gate.admits(Candidate(2, LessonKind.DOMAIN, language, question="x"), "Tell me of a mill")


def test_a_topic_that_only_an_earlier_turn_names_is_held_out_too() -> None:
    turns = (Turn("user", "Tell me about Angkor."), Turn("assistant", "It is in Cambodia."))
    chat = Conversation("h", "en", Split.HELDOUT, "When was it built?", None, earlier=turns)
    gate = Gate.of([*TEXTS, chat], [])
    for question in ("What makes Angkor special?", "Is Cambodia large?"):
        assert not gate.admits(PROPOSED, question)
    assert gate.dropped == {Reason.HELDOUT_QUESTION: 2}
    assert gate.admits(PROPOSED, "Where do most flamingos spend the winter?")
