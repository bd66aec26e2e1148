"""Texts become tokens: chat templates, the shared prefix, cuts, and two tokenizers."""

from __future__ import annotations

import pytest

from rotdistill_core.data.chat import ChatFormat
from rotdistill_core.data.conversations import Conversation
from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.data.splits import Split
from rotdistill_core.data.tokenization import (
    decode_answer,
    prompt_tokens,
    tokenize_for_both,
    tokenize_texts,
)
from rotdistill_core.errors import SetupError
from rotdistill_core.testing import pico_tokenizer


class Letters:
    """A tokenizer of single characters with a chat template."""

    chat_template = (
        "{% for m in messages %}{{ '<' + m.role[0] + '>' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    name_or_path = "letters"
    eos_token_id: int | None = 0
    all_special_ids = (0,)

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))

    def __call__(self, text: str, **_: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


class ThinkingLetters(Letters):
    """Its generation prompt is not how the whole chat begins."""

    chat_template = Letters.chat_template.replace("<a>", "<a>?")


STYLE = "Be brief."
ANSWERS = {"q": [7, 8]}
ASKED = [
    Conversation("p", "en", Split.FIT, "Who?", "Me."),
    Conversation("q", "en", Split.HELDOUT, "When?", None),
]
GUARD = [
    Conversation("g0", "en", Split.GUARD, "", "a\nb0"),
    Conversation("g1", "en", Split.GUARD_VALIDATION, "", "a\nb1"),
]


def written(tokens: tuple[int, ...] | list[int]) -> str:
    return "".join(map(chr, tokens))


def tokenized(
    questions: list[Conversation] = ASKED, max_tokens: int = 500, tokenizer: Letters | None = None
) -> PackedTexts:
    return tokenize_texts(tokenizer or Letters(), questions, ANSWERS, STYLE, max_tokens).layout


def test_the_shared_prompt_becomes_the_prefix() -> None:
    layout = tokenized()
    shared = "<s>Be brief.\n<u>Wh"
    assert layout.prefix == len(shared)
    assert written(layout.tokens[: layout.prefix].tolist()) == shared
    first, second = layout.texts
    assert written(first.tokens[first.answer :]) == "Me.\n"
    assert second.tokens[second.answer :] == (7, 8)


def test_a_single_text_keeps_the_row_that_predicts_its_answer() -> None:
    layout = tokenized(ASKED[:1])
    rows, targets, _ = layout.prediction_rows("fit")
    assert chr(layout.tokens[rows[0]]) == ">"
    assert written(targets.tolist()) == "Me.\n"
    assert int(rows[0]) >= layout.prefix


def test_an_answer_is_tokenised_alone_if_the_prompt_does_not_begin_the_chat() -> None:
    (text,) = tokenized(ASKED[:1], tokenizer=ThinkingLetters()).texts
    assert written(text.tokens[: text.answer]).endswith("<a>?")
    assert written(text.tokens[text.answer :]) == "Me.\0"


def test_a_text_is_cut_but_keeps_a_token_of_its_answer() -> None:
    whole = tokenized(ASKED[:1]).texts[0]
    cut = tokenized(ASKED[:1], max_tokens=whole.answer + 1).texts[0]
    assert cut.tokens == whole.tokens[: whole.answer + 1]
    with pytest.raises(SetupError, match="text p: its prompt alone has"):
        tokenized(ASKED[:1], max_tokens=whole.answer)


def test_held_out_answers_are_never_cut() -> None:
    questions = [
        Conversation("a", "en", Split.FIT, "w1", "w2 " * 40),
        Conversation("h", "en", Split.HELDOUT, "w3", None),
    ]
    samples = tokenize_texts(pico_tokenizer(64), questions, {"h": [7] * 40}, "w4", 20)
    lengths = {text.id: len(text.tokens) for text in samples.layout.texts}
    assert lengths["a"] == 20
    assert lengths["h"] > 40


def test_a_tokenizer_without_a_chat_template_writes_plainly() -> None:
    tokenizer = Letters()
    tokenizer.chat_template = None
    (text, _) = tokenized(tokenizer=tokenizer).texts
    assert written(text.tokens) == f"{STYLE}\n\nUser: Who?\nAssistant: Me."
    assert written(text.tokens[text.answer :]) == " Me."


def test_texts_outside_the_domain_have_no_chat_and_are_not_cut() -> None:
    layout = tokenized([*ASKED, *GUARD], max_tokens=30)
    assert layout.prefix == len("<s>Be brief.\n<u>Wh")
    assert [written(text.tokens) for text in layout.texts if text.plain] == ["a\nb0", "a\nb1"]


def test_two_tokenizers_read_conversations_alone() -> None:
    samples = tokenize_for_both(Letters(), Letters(), [*ASKED, *GUARD], ANSWERS, STYLE, 500)
    assert [text.id for text in samples.layout.texts] == ["p", "q"]
    assert [text.id for text in samples.teacher.texts] == ["p", "q"]


def test_the_student_reads_the_teachers_answer_in_its_own_tokens() -> None:
    answers = {"q": [ord("1"), ord("8"), 0, ord("x")]}
    samples = tokenize_for_both(pico_tokenizer(64), Letters(), ASKED, answers, "w4", 500)
    student, teacher = samples.layout.texts[1], samples.teacher.texts[1]
    assert list(teacher.tokens[teacher.answer :]) == answers["q"]
    assert len(student.tokens) - student.answer == 2  # an unknown word, and the end of the turn


@pytest.mark.parametrize(
    ("tokens", "text"), [([104, 105, 0, 104], "hi"), ([32, 104, 0xFFFD, 105], "h"), ([], "")]
)
def test_a_decoded_answer_ends_at_special_tokens_and_broken_characters(
    tokens: list[int], text: str
) -> None:
    assert decode_answer(Letters(), tokens) == text


def test_prompt_tokens_end_where_the_answer_begins() -> None:
    chat = ChatFormat.of(Letters())
    (prompt,) = prompt_tokens(Letters(), STYLE, ASKED[:1], chat).values()
    assert written(prompt) == "<s>Be brief.\n<u>Who?\n<a>"
