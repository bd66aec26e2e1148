"""The step `answers`: variants answer the held-out questions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from rotdistill_core import hookimpl, step
from rotdistill_core.data.splits import Split
from rotdistill_core.planning.cost import Cost, CostContext, answer_rows, generation_cost

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.data.packed import Samples
    from rotdistill_core.evaluation.rows import MetricRow, Variant
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.store.output import StepOutput

JUDGE_BYTES = 0.1e9
"""Memory of what tells the language of answers and compares them."""


@step
class Answers:
    """Let each saved variant answer the held-out questions greedily; compare with the teacher.

    Similarity: `answer_chrf` (chrF, 0 to 100), `answer_length` (characters over the teacher's),
    `answer_length_gap` (mean |ln| of that ratio), `answer_language` (share in the question's
    language), `answer_language_teacher` (share in the language of the teacher's answer).

    Form: `answer_repeats` (share of answers that repeat themselves: more than a quarter of their
    pieces of eight characters stood in them before).

    Content: `factual_completeness` (share of the expected facts that answers state),
    `hallucination_rate` (share of answers that assert a known error). With `_teacher`: the same of
    the teacher's answers.

    The step needs no capture. In the tour guides only some variants run it: `base` and `full`.
    """

    use: Literal["answers"] = "answers"
    max_tokens: PositiveInt | None = None
    """Longest answer in tokens; without it, the length of the teacher's longest answer."""

    def cost(self, context: CostContext) -> Cost:
        """The whole student answers the held-out questions; then libraries judge the answers."""
        texts = context.texts
        questions = texts.texts.get(Split.HELDOUT, 0)
        tokens = round(answer_rows(context, Split.HELDOUT))
        if self.max_tokens is not None:
            tokens = self.max_tokens * questions
        answers = generation_cost(context.student, texts, questions, tokens, context.student_bytes)
        return answers + Cost(host_bytes=JUDGE_BYTES)

    @hookimpl
    def evaluate(
        self, variant: Variant, pair: Pair, samples: Samples, out: StepOutput, progress: Progress
    ) -> list[MetricRow]:
        """See `HookSpecs.evaluate`."""
        from rotdistill_answers._method import evaluate

        return evaluate(self, variant, pair, samples, out, progress)


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [Answers]
