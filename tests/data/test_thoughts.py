"""Thinking blocks: in prompts that open one, and in answers that begin inside of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rotdistill_core.data.chat import ChatFormat
from rotdistill_core.data.conversations import Conversation
from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.data.splits import Split
from rotdistill_core.data.thoughts import closed, continuing, opens_block, without_thoughts
from rotdistill_core.data.tokenization import (
    decode_answer,
    prompt_tokens,
    tokenize_for_both,
    tokenize_texts,
)
from rotdistill_core.planning.chats import Chats
from rotdistill_core.testing import pico_tokenizer

OPEN = "<a><think>\n"
TAKEN = "<a><think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("prompt", "ends"),
    [
        (OPEN, TAKEN),
        ("<a><think>", "<a><think></think>\n\n"),
        ("[assistant]<thought>\n", "[assistant]<thought>\n\n</thought>\n\n"),
        ("[/INST][THINK]", "[/INST][THINK][/THINK]\n\n"),
        (TAKEN, TAKEN),
        ("<a>", "<a>"),
        ("<think> of a number<a>", "<think> of a number<a>"),
    ],
)
def test_a_block_that_a_prompt_opens_is_ended(prompt: str, ends: str) -> None:
    assert closed(prompt) == ends
    assert opens_block(prompt) == (prompt != ends)
    assert not opens_block(ends)


@pytest.mark.parametrize(
    ("answer", "left"),
    [
        ("<think>\nwhy\n</think>\n\nThere.", "There."),
        ("why\nnot\n</think>\n\nThere.", "There."),
        ("</think>There.", "There."),
        ("<thought>why</thought> There.", "There."),
        ("<think>why", ""),
        ("why\n</think>\n", ""),
        ("There.", "There."),
        ("The tag </think> ends a block.", "The tag </think> ends a block."),
        ("One <think> begins it\n</think> and ends.", "One <think> begins it\n</think> and ends."),
    ],
)
def test_thoughts_are_taken_out_of_an_answer(answer: str, left: str) -> None:
    assert without_thoughts(answer) == left


@pytest.mark.parametrize(
    ("prompt", "answer", "follows"),
    [
        (OPEN, "<think>\nwhy\n</think>\n\nThere.", "why\n</think>\n\nThere."),
        (OPEN, "why\n</think>\n\nThere.", "why\n</think>\n\nThere."),
        (OPEN, "There.", "\n</think>\n\nThere."),
        (TAKEN, "<think>\nwhy\n</think>\n\nThere.", "There."),
        (TAKEN, "why\n</think>\n\nThere.", "There."),
        (TAKEN, "There.", "There."),
        ("<a>", "<think>\nwhy</think>There.", "<think>\nwhy</think>There."),
        ("<a>", "why\n</think>There.", "<think>\nwhy\n</think>There."),
        ("<a>", "There.", "There."),
    ],
)
def test_an_answer_from_elsewhere_follows_the_prompt(
    prompt: str, answer: str, follows: str
) -> None:
    assert continuing(prompt, answer) == follows


@pytest.mark.parametrize(
    ("thinking", "end"), [(False, "<think>\n\n</think>\n\n"), (True, "<think>\n")]
)
def test_a_template_begins_answers_in_a_block_only_if_models_may_think(
    tmp_path: Path, thinking: bool, end: str
) -> None:
    tokenizer = pico_tokenizer(64, thinks=True)
    tokenizer.save_pretrained(tmp_path)
    for chat in (ChatFormat.of(tokenizer, "", thinking), ChatFormat.read(tmp_path, "", thinking)):
        assert chat.opens_thoughts
        assert chat.prompts([chat.messages("", "w1")]) == [f"<user> w1 <end> <assistant> {end}"]
        notes = [note for note in Chats(chat, chat, chat).notes() if "thinking block" in note]
        assert len(notes) == (not thinking)
    assert not ChatFormat.of(pico_tokenizer(64)).opens_thoughts


ASKED = [
    Conversation("plain", "en", Split.FIT, "w1", "w2 w3"),
    Conversation("thought", "en", Split.FIT, "w1", "<think> w4 </think> w5"),
    Conversation("asked", "en", Split.HELDOUT, "w6", None),
]


def read(layout: PackedTexts, thinks: bool = True) -> dict[str, tuple[str, str]]:
    """Return the last tokens of each prompt, and the answer, as text."""
    tokenizer = pico_tokenizer(64, thinks=thinks)
    return {
        text.id: (
            tokenizer.decode(list(text.tokens[: text.answer])).partition("<assistant> ")[2],
            tokenizer.decode(list(text.tokens[text.answer :])),
        )
        for text in layout.texts
    }


def test_answers_stand_where_a_model_that_thinks_gives_them() -> None:
    tokenizer = pico_tokenizer(64, thinks=True)
    written = {"asked": tokenizer("w7 </think> w8 <end>")["input_ids"]}
    chat = ChatFormat.of(tokenizer, "", thinking=True)
    found = read(tokenize_texts(tokenizer, ASKED, written, "w9", 512, chat).layout)
    assert found == {
        "plain": ("<think>", "</think> w2 w3 <end>"),
        "thought": ("<think>", "w4 </think> w5 <end>"),
        "asked": ("<think>", "w7 </think> w8 <end>"),
    }
    (plain, *_) = ASKED
    found = read(tokenize_texts(tokenizer, [plain], {}, "w9", 512).layout)
    assert found == {"plain": ("<think> </think>", "w2 w3 <end>")}


@pytest.mark.parametrize(
    ("thinks", "end", "answer"), [(True, "<think>", "w7 </think> w8"), (False, "", None)]
)
def test_a_student_of_another_tokenizer_reads_thoughts_with_both_ends(
    thinks: bool, end: str, answer: str | None
) -> None:
    teacher, student = pico_tokenizer(64, thinks=True), pico_tokenizer(64, thinks=thinks)
    written = {"asked": teacher("w7 </think> w8 <end>")["input_ids"]}
    own = ChatFormat.of(student, "", thinking=True)
    chats = (own, ChatFormat.of(teacher, "", thinking=True))
    samples = tokenize_for_both(student, teacher, ASKED[2:], written, "w9", 512, chats)
    (text,) = samples.layout.texts
    tokens = list(text.tokens[text.answer :])
    assert read(samples.layout, thinks)["asked"][0] == end
    if answer:
        assert student.decode(tokens) == f"{answer} <end>"
    else:
        # Its tokens for the marks are unknown words, both of them.
        assert student.decode(tokens) == "<unk> w7 <unk> w8 <end>"


def test_marks_that_a_tokenizer_calls_special_end_no_answer() -> None:
    tokenizer = pico_tokenizer(64, thinks=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokens = tokenizer("w7 </think> w8 <end> w9")["input_ids"]
    assert {"<think>", "<end>"} <= {*tokenizer.all_special_tokens}
    assert decode_answer(tokenizer, tokens) == "w7 </think> w8"


def test_prompts_are_those_that_an_engine_is_asked() -> None:
    tokenizer = pico_tokenizer(64, thinks=True)
    chat = ChatFormat.of(tokenizer)
    (prompt,) = prompt_tokens(tokenizer, "", ASKED[2:], chat).values()
    assert tokenizer.decode(prompt) == "<user> w6 <end> <assistant> <think> </think>"
