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
    from rotdistill_core.forward.layerwise import LayerwiseForward

Values = Callable[[Tensor, Tensor], Tensor]
"""Row numbers of a process' own texts [n], and their places among the rows that are asked for [n]
-> numbers of these rows `[k, n]`."""


def compared(
    pair: Pair,
    T: Tensor,
    weights: Weights,
    forward: LayerwiseForward,
    rows: Tensor,
    targets: Tensor,
) -> LogitComparison:
    """Compare the predictions of a finished forward pass with the teacher's, in all processes.

    Args:
        pair: teacher and student, of one vocabulary.
        T: the teacher's states of these rows after its last layer `[n, d_t]`, in all processes.
        weights: the model that went through the pass.
        forward: the pass.
        rows: row numbers of the whole [n].
        targets: the token after each row [n].
    """
    teacher, vocabulary = pair.teacher.weights, shared_vocabulary(pair)
    # As wide as the states that they multiply.
    like = forward.states_of(rows[:0])
    teacher_head = head_for(teacher, like, vocabulary)
    head = head_for(weights, like, vocabulary)

    def values(own: Tensor, places: Tensor) -> Tensor:
        S = forward.states_of(own)
        found = compare_logits(
            teacher, T[places], weights, S, targets[places], vocabulary, head, teacher_head
        )
        return torch.stack([found.kl, found.top1, found.nll])

    kl, top1, nll = _of_rows(forward, rows, 3, values)
    return LogitComparison(kl=kl, top1=top1, nll=nll)


def answer_nll(
    weights: Weights, forward: LayerwiseForward, rows: Tensor, targets: Tensor
) -> Tensor:
    """Return -log p [n] of the tokens [n] after rows of the whole [n], nats, in all processes."""
    head = head_for(weights, forward.states_of(rows[:0]))

    def values(own: Tensor, places: Tensor) -> Tensor:
        S = forward.states_of(own)
        return _nll(weights, S, targets[places].to(S.device), head)[None]

    return _of_rows(forward, rows, 1, values)[0]


def _nll(weights: Weights, S: Tensor, targets: Tensor, head: Tensor) -> Tensor:
    """Return -log p [n] of target tokens [n], given states before the final norm `[n, d]`."""
    parts = []
    for k in range(0, len(S), BLOCK_ROWS):
        block = slice(k, k + BLOCK_ROWS)
        q = log_probs(weights, S[block], head)
        parts.append(-q.gather(-1, targets[block, None])[:, 0])
    return torch.cat(parts).cpu().double()


def _of_rows(forward: LayerwiseForward, rows: Tensor, count: int, values: Values) -> Tensor:
    """Return so many numbers of each row of the whole [n], `[count, n]`, from all processes."""
    places = torch.full((forward.whole.rows,), -1).index_copy(0, rows, torch.arange(len(rows)))
    found = torch.zeros(count, forward.layout.rows, dtype=torch.float64)
    for batch in forward.blocks:
        own = batch[places[forward.rows[batch]] >= 0]
        if len(own):
            found[:, own] = values(own, places[forward.rows[own]])
    return torch.stack([forward.assembled(each)[rows] for each in found])
