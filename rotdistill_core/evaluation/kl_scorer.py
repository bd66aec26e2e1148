"""KL from the teacher of a view of the student, on the answers of one split or of two."""

from __future__ import annotations

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts, Samples
from rotdistill_core.data.splits import Split
from rotdistill_core.evaluation.acceptance import (
    MAX_SCORED_ROWS,
    TextScores,
    paired_final_states,
    scored_rows,
    scores_by_text,
)
from rotdistill_core.evaluation.divergence import compare_logits, shared_vocabulary
from rotdistill_core.forward.layerwise import LayerwiseForward, Progress
from rotdistill_core.forward.ranks import ALONE, Ranks
from rotdistill_core.store.output import StepOutput


class KLScorer:
    """Scores a view of the student by its KL from the teacher, text by text.

    Processes share the teacher's pass. Each of them can score.
    """

    def __init__(
        self,
        pair: Pair,
        samples: Samples,
        split: str,
        out: StepOutput,
        progress: Progress,
        ranks: Ranks = ALONE,
        limit: int = MAX_SCORED_ROWS,
    ) -> None:
        """Compute the teacher's states, or find them.

        Args:
            pair: teacher and student of one vocabulary.
            samples: all texts.
            split: the split that is scored.
            out: takes what has to be computed.
            progress: called once for each layer of the teacher.
            ranks: the processes that share the teacher's pass.
            limit: most rows that are scored, evenly spread.
        """
        self.pair = pair
        self.tokens = shared_vocabulary(pair)
        self.layout = _scored_texts(samples, split)
        self.rows, self.targets, self.text = scored_rows(self.layout, samples, split, limit)
        states = paired_final_states(pair.teacher, samples, self.layout, out, progress, ranks)
        self.states = states[self.rows]

    def __call__(self, view: Weights) -> TextScores:
        """Return the KL of a view."""
        student = self.pair.student
        forward = LayerwiseForward(view, self.layout, student.device, student.dtype)
        for _ in forward:
            forward.run()
        comparison = compare_logits(
            self.pair.teacher.weights,
            self.states,
            view,
            forward.states_of(self.rows),
            self.targets,
            self.tokens,
        )
        return scores_by_text(comparison.kl, self.text)


class EditScorer:
    """Scores a view of the student on validation texts and on those of the guard.

    It is what `accept_if_better` asks for.
    """

    def __init__(
        self,
        pair: Pair,
        samples: Samples,
        guard: float | None,
        out: StepOutput,
        progress: Progress,
        ranks: Ranks = ALONE,
        limit: int = MAX_SCORED_ROWS,
    ) -> None:
        """Compute the teacher's states of all that is scored, or find them.

        Args:
            pair: teacher and student of one vocabulary.
            samples: all texts.
            guard: see `guard_of`; with None the guard's texts are not scored.
            out: takes what has to be computed.
            progress: called once for each layer of the teacher.
            ranks: the processes that share the teacher's pass.
            limit: most rows of a split that are scored.
        """
        splits = [Split.VALIDATION, *([Split.GUARD_VALIDATION] if guard is not None else [])]
        self.scorers = {
            split: KLScorer(pair, samples, split, out, progress, ranks, limit) for split in splits
        }

    def __call__(self, view: Weights, split: Split = Split.VALIDATION) -> TextScores:
        """Return the KL of a view, nats, text by text."""
        return self.scorers[split](view)


def _scored_texts(samples: Samples, split: str) -> PackedTexts:
    """Return the texts of a split that `scored_rows` would look at.

    Those are the questions that the teacher answered itself, or all where there are none.
    """
    answered_by_teacher = samples.teacher_answered()
    whole = samples.layout.select(split)
    texts = tuple(text for text in whole.texts if text.id in answered_by_teacher)
    return PackedTexts(texts or whole.texts, whole.prefix)
