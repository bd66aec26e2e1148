"""How far a view of the student is from the teacher on the answers of a split, walked layer by layer."""

from __future__ import annotations

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts, Samples
from rotdistill_core.evaluation.acceptance import (
    TextScores,
    scored_rows,
    scores_by_text,
    teacher_final_states,
)
from rotdistill_core.evaluation.divergence import compare_logits, shared_vocabulary
from rotdistill_core.forward.layerwise import LayerwiseForward, Progress
from rotdistill_core.store.output import StepOutput

JUDGED_ROWS = 2048


class KLScorer:
    """Scores by KL from the teacher, text by text."""

    def __init__(
        self, pair: Pair, samples: Samples, split: str, out: StepOutput, progress: Progress
    ) -> None:
        self.pair, self.tokens = pair, shared_vocabulary(pair)
        own = {question.id for question in samples.questions if question.answer is None}
        whole = samples.layout.select(split)
        texts = (
            tuple(text for text in whole.texts if text.id in own) or whole.texts
        )  # those that `judged` would look at
        self.layout = layout = PackedTexts(texts, whole.prefix)
        self.rows, self.targets, self.text = scored_rows(layout, samples, split, JUDGED_ROWS)
        self.states = teacher_final_states(pair.teacher, layout, out, progress)[self.rows]

    def __call__(self, view: Weights) -> TextScores:
        """Return the KL of a view."""
        walk = LayerwiseForward(
            view, self.layout, self.pair.student.device, self.pair.student.dtype
        )
        for _ in walk:
            walk.run()
        seen = compare_logits(
            self.pair.teacher.weights,
            self.states,
            view,
            walk.states[self.rows],
            self.targets,
            self.tokens,
        )
        return scores_by_text(seen.kl, self.text)
