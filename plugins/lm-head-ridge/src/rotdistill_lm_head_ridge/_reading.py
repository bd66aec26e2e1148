"""What is kept of final states: the moments to fit on, and the rows that heads are judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rotdistill_core.data.splits import Split
from rotdistill_core.forward.head import final_norm, logits_of
from rotdistill_core.forward.ranks import ALONE, Ranks
from rotdistill_core.linalg.moments import Moments
from rotdistill_core.linalg.precision import wide_dtype

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.data.packed import PackedTexts
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_lm_head_ridge._final_states import StudentStates, TeacherStates

FIT_BLOCK_ROWS = 4096
"""Rows whose moments are added at once."""
BLOCKS_TOGETHER = 8
"""Blocks of a process after which it waits for the others. The longest wait has a limit."""


@dataclass(frozen=True)
class NormedRows:
    """A model's final states on the host, and its rows after the final norm on a device.

    Rows are numbered as in the texts. Only those are held that heads are judged by.
    """

    weights: Weights
    """The model, for its final norm."""
    states: Tensor
    """States before the norm of the rows that are held `[held, d]`."""
    places: Tensor
    """The place of each row of the texts among those that are held `[rows]`; -1 for the others."""
    device: torch.device
    dtype: torch.dtype
    """Dtype of the rows after the norm, float32 at least: that of both models' logits."""

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return rows [n] after the norm `[n, d]`."""
        return self.normed(self.states[self.places[rows]])

    def normed(self, states: Tensor) -> Tensor:
        """Return states `[n, d]` after the norm, on the device."""
        return final_norm(self.weights, states.to(self.device, self.dtype))

    def hold(self, states: Tensor, rows: Tensor) -> None:
        """Keep those of some states `[n, d]` whose rows [n] are to be held."""
        places = self.places[rows]
        held = places >= 0
        self.states[places[held]] = states[held].to(self.states)

    def gather(self, owner: Tensor, ranks: Ranks) -> None:
        """Let the leading process hold what all processes hold.

        Args:
            owner: the process that holds each row of the texts `[rows]`.
            ranks: the processes.
        """
        rows = (self.places >= 0).nonzero().flatten()
        places, owner = self.places[rows], owner[rows]
        lengths = torch.bincount(owner, minlength=ranks.count).tolist()
        parts = ranks.collect(self.states[places[owner == ranks.number]], lengths)
        for number, part in enumerate(parts or ()):
            self.states[places[owner == number]] = part

    def head(self, tokens: int) -> Tensor:
        """Return the first `tokens` rows of the model's head, to multiply these rows with."""
        return self.weights.head()[:tokens].to(self.device, self.dtype)

    def logits(self, rows: Tensor, head: Tensor) -> Tensor:
        """Return the logits of rows [n], `[n, V]`, that the model makes with a head `[V, d]`."""
        return logits_of(self.weights, self[rows] @ head.T)


class ReadStates(NamedTuple):
    """What is kept of both models' final states."""

    student: NormedRows
    teacher: NormedRows | None
    """None without a teacher."""
    moments: Moments
    """Of the paired rows to fit on, after the final norms; empty without a teacher."""


def read_states(
    student: StudentStates,
    teacher: TeacherStates | None,
    layout: PackedTexts,
    judged: Tensor,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> ReadStates:
    """Return the moments of the rows to fit on, and the rows that heads are judged by.

    Texts are read in blocks, so memory does not grow with them. Processes share the blocks. Sums
    are exact: they have the same bits in any order of blocks, and for any number of processes.

    Args:
        student: the student's states.
        teacher: the teacher's; None if the fit asks for none.
        layout: the texts to fit on, and those to judge by.
        judged: numbers of the rows to hold [n], in any order.
        progress: called after each block.
        ranks: the processes. The moments are those of all; only the leading one holds all rows.

    Raises:
        RotdistillError: a row to fit on is not finite.
    """
    held = torch.unique(judged)
    places = torch.full((layout.rows,), -1)
    places[held] = torch.arange(len(held))
    device, dtype = student.model.device, wide_dtype(student.model.dtype)

    def rows_of(weights: Weights, stored: torch.dtype) -> NormedRows:
        states = torch.empty(len(held), weights.width, dtype=stored)
        return NormedRows(weights, states, places, device, dtype)

    X = rows_of(student.weights, student.model.dtype)
    of_teacher = teacher.pair.teacher if teacher else None
    T = rows_of(of_teacher.weights, of_teacher.dtype) if of_teacher else None
    moments = _no_moments(X, T, layout.rows)
    fit = layout.split(Split.FIT)
    blocks = layout.blocks()
    owner = torch.full((layout.rows,), -1)
    for number, block in enumerate(blocks):
        rows = block.row_indices_in(layout)
        # Every block begins with the shared prompt, whose rows count once: in the first block.
        counted = (owner[rows] < 0).nonzero().flatten()
        owner[rows[counted]] = number % ranks.count
        if number and number % (BLOCKS_TOGETHER * ranks.count) == 0:
            ranks.add_up(torch.zeros(1))
        if number % ranks.count != ranks.number:
            continue
        states = student.on(block)
        X.hold(states[counted], rows[counted])
        if teacher and T:
            theirs = teacher.on(block)
            T.hold(theirs.states[counted], rows[counted])
            taken = counted[(fit[rows] & theirs.paired)[counted]]
            _add_rows(moments, X, states[taken], T, theirs.states[taken])
        finished = min(number + ranks.count, len(blocks))
        progress(finished, len(blocks), f"final states of {len(block.texts)} texts")
    X.gather(owner, ranks)
    if T:
        T.gather(owner, ranks)
        moments.combine(ranks.add_up, device)
    return ReadStates(X, T, moments.settled())


def _no_moments(X: NormedRows, T: NormedRows | None, rows: int) -> Moments:
    """Return empty moments of so many rows at most."""
    models = [X.weights, T.weights] if T else [X.weights]
    # A row of RMS 1 times the gain of the norm.
    longest = max(
        each.width * float(each.gain(each.adapter.norm).abs().max()) ** 2 for each in models
    )
    bound = float(max(rows, 1)) * max(1.0, longest)
    return Moments.exact(X.weights.width, models[-1].width, bound, "lm-head-ridge")


def _add_rows(moments: Moments, X: NormedRows, S: Tensor, T: NormedRows, theirs: Tensor) -> None:
    """Add paired rows, given both models' states before the norm `[n, d_s]`, `[n, d_t]`."""
    for k in range(0, len(S), FIT_BLOCK_ROWS):
        some = slice(k, k + FIT_BLOCK_ROWS)
        moments.add(X.normed(S[some]), T.normed(theirs[some]))
