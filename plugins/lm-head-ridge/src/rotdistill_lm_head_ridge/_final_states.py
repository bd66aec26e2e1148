"""Both models' states after the last layer, block by block of texts.

Captured states are read where they still hold, and others are computed. Of a block nothing stays
but what it adds to the moments, and the rows that heads are judged by.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rotdistill_core.data.pairing import pair_tokens
from rotdistill_core.data.splits import Side, Split
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.forward.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Model, Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.data.packed import PackedTexts, Samples
    from rotdistill_core.forward.activations import ActivationStore


PROBE_TEXTS = 2
"""Validation texts that are computed anew, to see whether captured rows are still the student's."""
PROBE_TOLERANCE = 1e-3
"""Largest distance of a computed row from the captured one, relative to the captured row's norm."""


@dataclass(frozen=True)
class StudentStates:
    """The student's stream after the last layer and before the final norm."""

    weights: Weights
    activations: ActivationStore
    model: Model
    captured: bool
    """Whether the captured rows are those of this student."""

    @classmethod
    def of(
        cls,
        weights: Weights,
        activations: ActivationStore,
        model: Model,
        layout: PackedTexts,
        ranks: Ranks = ALONE,
    ) -> StudentStates:
        """Find out by some texts of a layout whether the student is still the captured one.

        The leading process finds out.
        """

        def holds() -> bool:
            rows = activations.rows(Side.STUDENT, len(activations.depths) - 1)
            same_shape = (rows.shape[1], rows.dtype) == (weights.width, model.dtype)
            own = activations.layouts[Side.STUDENT]
            captured = _part(layout, {text.id for text in layout.texts} & set(own.numbers))
            probe = captured.select(Split.VALIDATION, limit=PROBE_TEXTS)
            return (
                bool(probe.texts)
                and activations.depths == weights.lineage.depths
                and same_shape
                and _agree(_computed(weights, model, probe), rows[probe.row_indices_in(own)])
            )

        return cls(weights, activations, model, ranks.lead(holds))

    def on(self, layout: PackedTexts) -> Tensor:
        """Return the states of the rows of some texts `[rows, d_s]`, on the host."""
        if not self.captured:
            return _computed(self.weights, self.model, layout)
        own = self.activations.layouts[Side.STUDENT]
        known = {text.id for text in layout.texts} & set(own.numbers)
        captured, missing = _part(layout, known), layout.where(lambda text: text.id not in known)
        states = torch.empty(layout.rows, self.weights.width, dtype=self.model.dtype)
        if captured.texts:
            rows = self.activations.rows(Side.STUDENT, len(self.activations.depths) - 1)
            states[captured.row_indices_in(layout)] = rows[captured.row_indices_in(own)]
        if missing.texts:
            computed = _computed(self.weights, self.model, missing)
            states[missing.row_indices_in(layout)] = computed
        return states


class TeacherRows(NamedTuple):
    """The teacher's states for rows of the student's texts."""

    states: Tensor
    """States before the final norm `[rows, d_t]`."""
    paired: Tensor
    """Mask of the rows that have one of their own `[rows]`."""


@dataclass(frozen=True)
class TeacherStates:
    """The teacher's stream after the last layer and before the final norm."""

    activations: ActivationStore
    pair: Pair
    samples: Samples

    def on(self, layout: PackedTexts) -> TeacherRows:
        """Return the states for the rows of some texts, on the host.

        They are computed unless the capture has kept the rows of all these texts.
        """
        read = self.samples.read_by_teacher(layout)
        if self.activations.holds(Side.TEACHER, read):
            states = self.activations.teacher_states(layout, self.pair.student.depth)
            return TeacherRows(states, self.activations.paired_mask(layout))
        teacher = self.pair.teacher
        states = _computed(teacher.weights, teacher, read)
        if read is layout:
            return TeacherRows(states, torch.ones(layout.rows, dtype=torch.bool))
        start, end = pair_tokens(layout, read).T
        return TeacherRows(states[start], end > start)


def _part(layout: PackedTexts, ids: set[str]) -> PackedTexts:
    """Return the texts of a layout with these ids, with its prefix."""
    return replace(layout, texts=tuple(text for text in layout.texts if text.id in ids))


def _agree(computed: Tensor, captured: Tensor) -> bool:
    """Return whether every computed row `[n, d]` is near its captured one."""
    distance = (computed - captured).norm(dim=1)
    return bool((distance <= PROBE_TOLERANCE * captured.norm(dim=1)).all())


def _computed(weights: Weights, model: Model, layout: PackedTexts) -> Tensor:
    """Send the rows of a layout through all layers; return their states `[rows, d]`."""
    forward = LayerwiseForward(weights, layout, model.device, model.dtype)
    for _ in forward:
        forward.run()
    return forward.states.cpu()
