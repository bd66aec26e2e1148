"""How far a student's predictions are from its teacher's, text by text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts, Samples
from rotdistill_core.evaluation.acceptance import TextScores, scored_rows, scores_by_text
from rotdistill_core.evaluation.dealt import compared
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.forward.ranks import ALONE, Ranks
from rotdistill_writer_refit.step import SCORED_ROWS

FinalStates = Callable[[PackedTexts, Tensor], Tensor]
"""Texts, and rows of them [n] -> the teacher's states after its last layer `[n, d_t]`, on the host,
in all processes."""


def score_split(
    split: str,
    weights: Weights,
    activations: ActivationStore,
    pair: Pair,
    samples: Samples,
    forward: LayerwiseForward | None = None,
) -> TextScores:
    """Return the KL to the teacher, in nats, on the answers in the texts of a split.

    Args:
        split: the split.
        weights: the student.
        activations: holds the teacher's final states of these texts.
        pair: teacher and student, as opened.
        samples: all texts.
        forward: see `Scorer.score`.
    """

    def captured(layout: PackedTexts, rows: Tensor) -> Tensor:
        return activations.teacher_states(layout, pair.student.depth)[rows]

    return Scorer(captured, pair, samples).score(split, weights, forward)


@dataclass(frozen=True)
class Scorer:
    """Compares students with their teacher."""

    final_states: FinalStates
    pair: Pair
    samples: Samples
    ranks: Ranks = ALONE
    """The processes that share the texts, and compare the predictions of their own."""
    folder: Path | None = None
    """Where the states of a forward pass lie in a file; see `LayerwiseForward`."""

    def score(
        self, split: str, weights: Weights, forward: LayerwiseForward | None = None
    ) -> TextScores:
        """Return the KL to the teacher, in nats, on the answers in the texts of a split.

        Args:
            split: the split.
            weights: the student.
            forward: a finished forward pass of `weights` over texts that include the split's.
                Without it the split's texts are sent through the student here.
        """
        forward = forward or self._finished(split, weights)
        scored = scored_rows(forward.whole, self.samples, split, SCORED_ROWS)
        T = self.final_states(forward.whole, scored.rows)
        comparison = compared(self.pair, T, weights, forward, scored.rows, scored.targets)
        return scores_by_text(comparison.kl, scored.text)

    def _finished(self, split: str, weights: Weights) -> LayerwiseForward:
        student = self.pair.student
        forward = LayerwiseForward(
            weights,
            self.samples.layout.select(split),
            student.device,
            student.dtype,
            ranks=self.ranks,
            folder=self.folder,
        )
        for _ in forward:
            forward.run()
        return forward
