"""How far a view of the student is from the teacher on the answers of a split, walked layer by layer."""

from __future__ import annotations

from rotdistill_judge import Scores, by_text, judged, teacher_states
from rotdistill_predictions import compare, shared_tokens

from rotdistill_core.api import Out, Pair, Progress, Samples, Walk, Weights
from rotdistill_core.samples import Layout

JUDGED_ROWS = 2048


class Judge:
    """Scores by KL from the teacher, text by text."""

    def __init__(self, pair: Pair, samples: Samples, split: str, out: Out, progress: Progress) -> None:
        self.pair, self.tokens = pair, shared_tokens(pair)
        own = {question.id for question in samples.questions if question.answer is None}
        whole = samples.layout.select(split)
        texts = tuple(text for text in whole.texts if text.id in own) or whole.texts  # those that `judged` would look at
        self.layout = layout = Layout(texts, whole.prefix)
        self.rows, self.targets, self.text = judged(layout, samples, split, JUDGED_ROWS)
        self.states = teacher_states(pair.teacher, layout, out, progress)[self.rows]

    def __call__(self, view: Weights) -> Scores:
        """Return the KL of a view."""
        walk = Walk(view, self.layout, self.pair.student.device, self.pair.student.dtype)
        for _ in walk:
            walk.run()
        seen = compare(self.pair.teacher.weights, self.states, view, walk.states[self.rows], self.targets, self.tokens)
        return by_text(seen.kl, self.text)
