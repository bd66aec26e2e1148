"""Predictions of rows that several processes share.

Each process compares the rows of its own batches, batch by batch. A batch has the same rows for any
number of processes, and so each row has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rotdistill_core.evaluation.divergence import (
    BLOCK_ROWS,
    LogitComparison,
    compare_logits,
    shared_vocabulary,
)
from rotdistill_core.forward.head import head_for, log_probs

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.forward.layerwise import LayerwiseForward

Values = Callable[[Tensor, Tensor], Tensor]
"""Row numbers of a process' own texts and of the whole [n] -> numbers of these rows `[k, n]`."""


def compared(
    pair: Pair,
    activations: ActivationStore,
    weights: Weights,
    forward: LayerwiseForward,
    rows: Tensor,
    targets: Tensor,
) -> LogitComparison:
    """Compare the predictions of a finished forward pass with the teacher's, in all processes.

    Args:
        pair: teacher and student, of one vocabulary.
        activations: holds the teacher's final states of these texts.
        weights: the model that went through the pass.
        forward: the pass.
        rows: row numbers of the whole [n].
        targets: the token after each row [n].
    """
    teacher, vocabulary = pair.teacher.weights, shared_vocabulary(pair)
    T = activations.teacher_states(forward.whole, pair.student.depth)
    next_tokens = _by_row(forward, rows, targets)

    def values(own: Tensor, whole: Tensor) -> Tensor:
        S, target = forward.states_of(own), next_tokens[whole]
        found = compare_logits(teacher, T[whole], weights, S, target, vocabulary)
        return torch.stack([found.kl, found.top1, found.nll])

    kl, top1, nll = _of_rows(forward, rows, 3, values)
    return LogitComparison(kl=kl, top1=top1, nll=nll)


def answer_nll(
    weights: Weights, forward: LayerwiseForward, rows: Tensor, targets: Tensor
) -> Tensor:
    """Return -log p [n] of the tokens [n] after rows of the whole [n], nats, in all processes."""
    next_tokens = _by_row(forward, rows, targets)

    def values(own: Tensor, whole: Tensor) -> Tensor:
        S = forward.states_of(own)
        return _nll(weights, S, next_tokens[whole].to(S.device))[None]

    return _of_rows(forward, rows, 1, values)[0]


def _nll(weights: Weights, S: Tensor, targets: Tensor) -> Tensor:
    """Return -log p [n] of target tokens [n], given states before the final norm `[n, d]`."""
    head = head_for(weights, S)
    parts = []
    for k in range(0, len(S), BLOCK_ROWS):
        block = slice(k, k + BLOCK_ROWS)
        q = log_probs(weights, S[block], head)
        parts.append(-q.gather(-1, targets[block, None])[:, 0])
    return torch.cat(parts).cpu().double()


def _by_row(forward: LayerwiseForward, rows: Tensor, values: Tensor) -> Tensor:
    """Return values [n] of rows [n] at the place of each row of the whole `[rows]`."""
    return torch.zeros(forward.whole.rows, dtype=values.dtype).index_copy(0, rows, values)


def _of_rows(forward: LayerwiseForward, rows: Tensor, count: int, values: Values) -> Tensor:
    """Return so many numbers of each row of the whole [n], `[count, n]`, from all processes."""
    wanted = torch.zeros(forward.whole.rows, dtype=torch.bool).index_fill(0, rows, True)
    found = torch.zeros(count, forward.layout.rows, dtype=torch.float64)
    for batch in forward.blocks:
        own = batch[wanted[forward.rows[batch]]]
        if len(own):
            found[:, own] = values(own, forward.rows[own])
    return torch.stack([forward.assembled(each)[rows] for each in found])
