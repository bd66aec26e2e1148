"""Tokens of two readings of a text are paired from both ends."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from rotdistill_core.data.packed import PackedTexts, Text
from rotdistill_core.data.pairing import pair_tokens
from rotdistill_core.data.splits import Split

tokens = st.lists(st.integers(0, 5), max_size=6)


def text(name: str, prompt: list[int], answer: list[int], plain: bool = False) -> Text:
    return Text(name, "en", Split.FIT, (*prompt, *answer), len(prompt), plain)


def test_what_only_the_teacher_reads_has_no_pair() -> None:
    # 1: the beginning, 9 8: the prompt, 7: a default in its place, 2: the end of the turn.
    student = PackedTexts((text("a", [1, 7, 2, 40], [50, 51]), text("b", [1, 7, 2, 41], [52])), 3)
    teacher = PackedTexts(
        (text("a", [1, 9, 8, 2, 40], [50, 51]), text("b", [1, 9, 8, 2, 41], [52])), 4
    )
    assert pair_tokens(student, teacher).tolist() == [
        [0, 1],  # read before anything differs
        [0, 0],  # the default, which the teacher does not read
        [3, 4],
        [4, 5],  # the question and the answer of a
        [5, 6],
        [6, 7],
        [7, 8],
        [8, 9],
    ]


def test_a_plain_text_is_read_alike() -> None:
    plain = text("p", [3], [4, 5], plain=True)
    student = PackedTexts((text("a", [1, 2], [3]), plain), 1)
    teacher = PackedTexts((text("a", [1, 9, 9, 2], [3]), plain), 3)
    assert pair_tokens(student, teacher)[3:].tolist() == [[5, 6], [6, 7], [7, 8]]


@given(tokens, tokens, tokens, st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_paired_rows_hold_the_same_token_and_all_of_the_answer(
    own: list[int], theirs: list[int], question: list[int], answer: list[int]
) -> None:
    student = PackedTexts((text("a", [0, *own, *question], answer),), 1)
    teacher = PackedTexts((text("a", [0, *theirs, *question], answer),), 1)
    start, end = pair_tokens(student, teacher).unbind(1)
    paired = end > start
    assert torch.equal(student.tokens[paired], teacher.tokens[start[paired]])
    assert bool(paired[-len(answer) - len(question) :].all())
    assert len(set(start[paired].tolist())) == int(paired.sum())
