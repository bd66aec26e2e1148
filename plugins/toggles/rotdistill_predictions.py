"""Comparing a student's predictions with the teacher's, in blocks of rows so that no `[rows, vocabulary]` matrix is ever whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rotdistill_core.errors import SetupError
from rotdistill_core.models import Pair
from rotdistill_core.walk import log_probabilities
from rotdistill_core.weights import Weights

BLOCK = 256


@dataclass(frozen=True)
class Comparison:
    """One value per row [n]."""

    kl: Tensor
    """KL(teacher ‖ student) over the shared tokens, nats."""
    top1: Tensor
    """1 where both rank the same token first."""
    nll: Tensor
    """-log p(student) of the target token, nats."""


def shared_tokens(pair: Pair) -> int:
    """Return how many leading head rows mean the same token in both models (rows above the tokenizer are padding).

    Raises:
        SetupError: the tokenizers give different tokens to the same ids.
    """
    mine = pair.student.tokenizer.get_vocab()
    if not pair.one_tokenizer:
        theirs = pair.teacher.tokenizer.get_vocab()
        differ = sum(theirs.get(token) != i for token, i in mine.items())
        raise SetupError(
            f"{pair.teacher.ref.model} and {pair.student.ref.model} have different tokenizers: {differ} of {len(mine)} tokens of "
            f"the student have another id or none in the teacher. Streams can be aligned, but logits not compared."
        )
    return min(int(max(mine.values())) + 1, pair.teacher.weights.head().shape[0], pair.student.weights.head().shape[0])


@torch.no_grad()
def compare(
    teacher: Weights, T: Tensor, student: Weights, S: Tensor, targets: Tensor, tokens: int, head: Tensor | None = None
) -> Comparison:
    """Compare raw final states `T [n, d_t]` and `S [n, d_s]`; `head` stands in for the student's own when given."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    teacher_head, student_head = teacher.head().to(S.dtype), (student.head() if head is None else head).to(S.dtype)
    for k in range(0, len(S), BLOCK):
        p = log_probabilities(teacher, T[k : k + BLOCK].to(S), teacher_head, tokens)
        q = log_probabilities(student, S[k : k + BLOCK], student_head, tokens)
        nll = -q.gather(-1, targets[k : k + BLOCK].to(q.device)[:, None])[:, 0]
        parts.append(((p.exp() * (p - q)).sum(-1), (p.argmax(-1) == q.argmax(-1)).to(q), nll))
    return Comparison(*(torch.cat(column).double().cpu() for column in zip(*parts, strict=True)))
