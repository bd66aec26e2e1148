"""How far a student's predictions are from its teacher's, text by text."""

from __future__ import annotations

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.evaluation.acceptance import TextScores, scored_rows, scores_by_text
from rotdistill_core.evaluation.divergence import compare_logits, shared_vocabulary
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.forward.ranks import ALONE, Ranks
from rotdistill_writer_refit.step import SCORED_ROWS


def score_split(
    split: str,
    weights: Weights,
    activations: ActivationStore,
    pair: Pair,
    samples: Samples,
    forward: LayerwiseForward | None = None,
    ranks: Ranks = ALONE,
) -> TextScores:
    """Return the KL to the teacher, in nats, on the answers in the texts of a split.

    Args:
        split: the split.
        weights: the student.
        activations: holds the teacher's final states of these texts.
        pair: teacher and student, as opened.
        samples: all texts.
        forward: a finished forward pass of `weights` over texts that include the split's. Without
            it the split's texts are sent through the student here.
        ranks: the processes that share the texts; the leading one compares predictions.
    """
    student, teacher = pair.student, pair.teacher
    if forward is None:
        layout = samples.layout.select(split)
        forward = LayerwiseForward(weights, layout, student.device, student.dtype, ranks=ranks)
        for _ in forward:
            forward.run()
    whole = forward.whole
    scored = scored_rows(whole, samples, split, SCORED_ROWS)
    states = forward.collected(scored.rows)

    def compare() -> TextScores:
        assert states is not None
        T = activations.teacher_states(whole, student.depth)[scored.rows]
        S = states.to(forward.device)
        tokens = shared_vocabulary(pair)
        comparison = compare_logits(teacher.weights, T, weights, S, scored.targets, tokens)
        return scores_by_text(comparison.kl, scored.text)

    return ranks.lead(compare)
