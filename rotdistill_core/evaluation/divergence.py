"""Comparing a student's predictions with the teacher's, in blocks of rows so that no `[rows, vocabulary]` matrix is ever whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import SetupError
from rotdistill_core.forward.head import log_probs

BLOCK_ROWS = 256


@dataclass(frozen=True)
class LogitComparison:
    """One value per row [n]."""

    kl: Tensor
    """KL(teacher ‖ student) over the shared tokens, nats."""
    top1: Tensor
    """1 where both rank the same token first."""
    nll: Tensor
    """-log p(student) of the target token, nats."""


def shared_vocabulary(pair: Pair) -> int:
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
    return min(
        int(max(mine.values())) + 1,
        pair.teacher.weights.head().shape[0],
        pair.student.weights.head().shape[0],
    )


@torch.no_grad()
def compare_logits(
    teacher: Weights,
    T: Tensor,
    student: Weights,
    S: Tensor,
    targets: Tensor,
    tokens: int,
    head: Tensor | None = None,
) -> LogitComparison:
    """Compare raw final states `T [n, d_t]` and `S [n, d_s]`; `head` stands in for the student's own when given."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    teacher_head, student_head = (
        teacher.head().to(S.dtype),
        (student.head() if head is None else head).to(S.dtype),
    )
    for k in range(0, len(S), BLOCK_ROWS):
        p = log_probs(teacher, T[k : k + BLOCK_ROWS].to(S), teacher_head, tokens)
        q = log_probs(student, S[k : k + BLOCK_ROWS], student_head, tokens)
        nll = -q.gather(-1, targets[k : k + BLOCK_ROWS].to(q.device)[:, None])[:, 0]
        parts.append(((p.exp() * (p - q)).sum(-1), (p.argmax(-1) == q.argmax(-1)).to(q), nll))
    return LogitComparison(
        *(torch.cat(column).double().cpu() for column in zip(*parts, strict=True))
    )
