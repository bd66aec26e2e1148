"""The KL from the teacher's predictions to a student's, row by row.

Rows are compared in blocks: no matrix `[rows, vocabulary]` is ever whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.vocabularies import different_vocabularies
from rotdistill_core.forward.head import head_for, log_probs, widened_like

BLOCK_ROWS = 256
"""Rows whose logits are held at once."""


def kl_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Return `KL(teacher ‖ student)` [n] in nats from log-probabilities `[n, V]` of both."""
    return (teacher.exp() * (teacher - student)).sum(-1)


@dataclass(frozen=True)
class LogitComparison:
    """One float64 value per row [n]."""

    kl: Tensor
    """KL(teacher ‖ student) over the shared tokens, nats."""
    top1: Tensor
    """1 where both rank the same token first, else 0."""
    nll: Tensor
    """-log p(student) of the target token, nats."""


def shared_vocabulary(pair: Pair) -> int:
    """Return how many leading head rows mean the same token in both models.

    Rows above the tokenizer's ids are padding.

    Raises:
        SetupError: the tokenizers give different tokens to the same ids.
    """
    ids = pair.student.tokenizer.get_vocab()
    if not pair.one_tokenizer:
        teacher_ids = pair.teacher.tokenizer.get_vocab()
        differ = sum(teacher_ids.get(token) != i for token, i in ids.items())
        raise different_vocabularies(pair, differ, len(ids))
    return min(
        int(max(ids.values())) + 1,
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
    teacher_head: Tensor | None = None,
) -> LogitComparison:
    """Compare the predictions of two models on the same rows.

    Logits and KL are computed on the device of S, in float32 at least. Whoever compares many
    batches gives both heads, as `head_for` returns them: then they are converted only once.

    Args:
        teacher: weights whose final norm and head read `T`.
        T: the teacher's states before the final norm `[n, d_t]`.
        student: weights whose final norm and head read `S`.
        S: the student's states before the final norm `[n, d_s]`.
        targets: the token that follows each row [n].
        tokens: leading head rows that are compared, see `shared_vocabulary`.
        head: stands in for the student's own head `[V, d_s]`.
        teacher_head: stands in for the teacher's own head `[V, d_t]`.
    """
    teacher_head = _head(teacher, S, tokens, teacher_head)
    student_head = _head(student, S, tokens, head)
    targets = targets.to(S.device)
    kl: list[Tensor] = []
    top1: list[Tensor] = []
    nll: list[Tensor] = []
    for k in range(0, len(S), BLOCK_ROWS):
        block = slice(k, k + BLOCK_ROWS)
        p = log_probs(teacher, T[block].to(S.device), teacher_head)
        q = log_probs(student, S[block], student_head)
        p = p.to(q)
        kl.append(kl_divergence(p, q))
        top1.append((p.argmax(-1) == q.argmax(-1)).to(q))
        nll.append(-q.gather(-1, targets[block, None])[:, 0])
    return LogitComparison(kl=_joined(kl), top1=_joined(top1), nll=_joined(nll))


def _head(weights: Weights, S: Tensor, tokens: int, given: Tensor | None) -> Tensor:
    """Return the head `[tokens, d]` that predicts: the one that is given, or the model's own."""
    return head_for(weights, S, tokens) if given is None else widened_like(given, S)[:tokens]


def _joined(blocks: list[Tensor]) -> Tensor:
    """Return the values of all blocks in float64, on the host."""
    return torch.cat(blocks).cpu().double()
