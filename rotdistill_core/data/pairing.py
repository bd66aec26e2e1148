"""Rows of two readings of the same texts that stand for the same token, in one vocabulary.

The teacher reads a system prompt that the student's texts lack (`samples.bake_prompt`). Question,
answer and what the template writes after them are the same tokens at other places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotdistill_core.data.packed import PackedTexts, Text

UNPAIRED = (0, 0)
"""The span of a row without a pair: it holds no row."""


def pair_tokens(student: PackedTexts, teacher: PackedTexts) -> Tensor:
    """Pair the tokens that both readings of a text begin with, and those that they end with.

    Between them is what only one of the two reads. At the beginning both models have read the same
    so far; at the end are the question and the answer.

    Args:
        student: the texts as the student reads them.
        teacher: the same texts, in the same order, as the teacher reads them.

    Returns:
        For each row of the student, the rows `[start, end)` of the teacher `[rows, 2]`: one row, or
        `UNPAIRED`.
    """
    spans = torch.tensor([UNPAIRED]).repeat(student.rows, 1)
    for k, (own, theirs) in enumerate(zip(student.texts, teacher.texts, strict=True)):
        first, last = _common_ends(own, theirs)
        shift = len(theirs.tokens) - len(own.tokens)
        pairs = [(at, at) for at in range(first)]
        pairs += [(at, at + shift) for at in range(len(own.tokens) - last, len(own.tokens))]
        rows = student.rows_at(k, torch.tensor([own_at for own_at, _ in pairs], dtype=torch.long))
        found = teacher.rows_at(k, torch.tensor([at for _, at in pairs], dtype=torch.long))
        spans[rows] = torch.stack([found, found + 1], 1)
    return spans


def _common_ends(one: Text, two: Text) -> tuple[int, int]:
    """Return how many tokens two readings share at their beginning, and at their end.

    No token counts twice. The end goes first: it has the answer, whose rows are what is learned.
    """
    shorter = min(len(one.tokens), len(two.tokens))
    last = 0
    while last < shorter and one.tokens[-1 - last] == two.tokens[-1 - last]:
        last += 1
    first = 0
    while first < shorter - last and one.tokens[first] == two.tokens[first]:
        first += 1
    return first, last
