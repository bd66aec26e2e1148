"""Options of `lm-head-ridge`: fit the LM head to the teacher's logits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from rotdistill_core import hookimpl, step
from rotdistill_core.data.batching import BLOCK_TEXTS
from rotdistill_core.data.splits import Split
from rotdistill_core.data.vocabularies import require_one_vocabulary
from rotdistill_core.evaluation.guard import Guard, is_guarded
from rotdistill_core.forward.ranks import ALONE
from rotdistill_core.planning.cost import (
    FLOAT64_BYTES,
    LOGIT_BLOCKS,
    Added,
    Cost,
    CostContext,
    Gathered,
    answer_rows,
    converted_bytes,
    forward_cost,
    logit_bytes,
)
from rotdistill_core.plugin.caveats import Caveat, ridge_caveats

if TYPE_CHECKING:
    from rotdistill_core import ActivationStore, Pair, Progress, Ranks, Samples, StepOutput, Weights


Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
BLOCK_ROWS = 128
"""Rows whose logits are held at once."""
SCORED_ROWS = 1024
"""Largest number of validation rows: `MAX_SCORED_ROWS` of the core, whose module needs torch."""


@step
class LmHeadRidge:
    """Fit the head to the teacher's logits by ridge regression towards the student's own head.

    Ridge and blend are chosen by validation KL. Leaving the head alone is always a candidate.
    With `objective = "kl"` a linear map before that head is then fitted to the KL itself, on
    rows that predict answers. It is taken if validation KL falls further. Rows of padding
    tokens do not change.
    """

    use: Literal["lm-head-ridge"] = "lm-head-ridge"
    ridge: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.01, 0.1, 1.0)
    """Candidates for λ, as multiples of the mean diagonal of `C_ss`."""
    blend: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.25, 0.5, 1.0)
    """Candidates for the share of the fitted head in the new one."""
    max_texts: PositiveInt | None = None
    """Fit on the first so many fit texts; on all if unset. A head has few unknowns per vocabulary
    row, so a few dozen texts are enough."""
    objective: Literal["ridge", "kl", "next-token"] = "ridge"
    """`"ridge"`: the regression alone. `"kl"`: then fit a linear map before that head to the KL.
    `"next-token"`: the control without a teacher, which fits only the map, to the texts' own next
    tokens."""
    logit_penalty: Annotated[float, Field(ge=0)] = 30.0
    """Weight of the mean square of what the map adds to the logits, relative to the mean KL."""
    max_rows: PositiveInt = 4096
    """Largest number of rows to fit the map on. Rows of answers that the teacher wrote come
    first."""
    max_tokens: PositiveInt = 8192
    """Largest number of tokens that the map's KL distinguishes; all others count as one."""
    max_iter: PositiveInt = 24
    """Largest number of L-BFGS steps."""
    guard: Guard | None = None
    """Allow only heads whose KL on the guard's validation half is at most this multiple of the
    KL before, or 0.05 nats; the reported half may differ. By default 1.02 (2 % worse) where the
    recipe has guard texts; `"off"` for no limit."""

    exact: ClassVar[bool] = False

    def cost(self, context: CostContext) -> Cost:
        """One pass through the student and, where its states were not captured, the teacher.

        Blocks of texts are dealt, with their sums. The first process gathers the rows that heads
        are judged by, and alone scores heads.

        In memory are one block of texts, the moments, the rows that heads are judged by, both
        heads, three new heads, and blocks of logits. All of that but blocks and moments lies where
        the student computes, in float32 at least.
        """
        student, teacher, number = context.student, context.teacher, context.student_bytes
        wide = logit_bytes(context)
        texts = context.texts
        fit_texts = min(self.max_texts or texts.texts_of(Split.FIT), texts.texts_of(Split.FIT))
        rows = texts.rows_of(Split.FIT, limit=self.max_texts) + texts.rows_of(Split.VALIDATION)
        blocks = -(-(fit_texts + texts.texts_of(Split.VALIDATION)) // BLOCK_TEXTS)
        block_rows = min(rows, texts.rows_of(Split.FIT, limit=BLOCK_TEXTS))
        cost = forward_cost(student, block_rows, number).repeated(blocks)
        if context.sums and self.objective != "next-token":
            walk = forward_cost(teacher, block_rows, context.teacher_bytes)
            cost += walk.on_teacher().repeated(blocks)
        head = student.vocab * student.width * number
        judged = SCORED_ROWS + (0 if self.objective == "ridge" else self.max_rows)
        # Both models' final states, before and after the norm; of a block before the norm.
        states = min(rows, judged) * (2 * student.width + 2 * teacher.width) * number
        gathered = states // 2
        added_up: tuple[Added, ...] = ()
        if self.objective == "next-token":
            gathered = min(rows, judged) * student.width * number
        else:
            sums = 2 * student.width * (student.width + teacher.width) * FLOAT64_BYTES
            added_up = (Added(sums, 1),)
        states += block_rows * (student.width + teacher.width) * number
        # Integers of two limbs, what they are added from, and the sums themselves.
        moments = 4 * student.width * (student.width + teacher.width) * FLOAT64_BYTES
        # Heads that are stored in another dtype than is computed in are copied.
        copied = student.width * converted_bytes(student, wide)
        copied += teacher.width * converted_bytes(teacher, wide)
        held = self._held_bytes(context, rows)
        host = states + moments + student.vocab * copied + held
        device = student.vocab * (student.width + teacher.width) * wide + held
        scores = self._scores(context)
        return replace(
            cost,
            host_bytes=cost.host_bytes + host,
            device_bytes=max(cost.device_bytes, device),
            disk_bytes=head,
            operations=cost.operations + scores.operations,
            activations=cost.activations + scores.activations,
            dealt_operations=cost.operations,
            added_up=added_up,
            gathered=(Gathered(gathered, blocks),),
        )

    def _held_bytes(self, context: CostContext, rows: int) -> float:
        """Return the memory of three new heads, of blocks of logits, and of the map's targets."""
        vocab, wide = context.student.vocab, logit_bytes(context)
        heads = 3 * vocab * context.student.width * wide
        logits = 3 * min(BLOCK_ROWS, rows) * vocab * wide
        # Probabilities of the map's fit rows, and their logits.
        targets = 0 if self.objective == "ridge" else self.max_rows * self.max_tokens * wide * 2
        return heads + logits + targets

    def _scores(self, context: CostContext) -> Cost:
        """Return the work of judging heads, and of fitting the map, if all its steps are made."""
        student, teacher = context.student, context.teacher
        scored = min(SCORED_ROWS, answer_rows(context, Split.VALIDATION))
        # Every candidate of the default grid reads both heads on every scored row.
        judged = scored
        if is_guarded(self.guard, context.texts):
            judged += context.texts.rows_of(Split.GUARD_VALIDATION)
        heads = student.vocab * (student.width + teacher.width)
        cost = Cost(
            operations=10.0 * judged * heads,
            activations=5.0 * LOGIT_BLOCKS * judged * student.vocab,
        )
        if self.objective == "ridge":
            return cost
        # A step of L-BFGS takes the logits of the fit rows, forward and backward, once or twice,
        # and the KL on validation rows.
        rows = min(self.max_rows, answer_rows(context, Split.FIT))
        logits = rows * min(self.max_tokens, student.vocab)
        step = Cost(
            operations=1.5 * 4 * logits * student.width + 2.0 * scored * heads,
            activations=1.5 * 2 * logits + LOGIT_BLOCKS * scored * student.vocab,
        )
        return cost + step.repeated(self.max_iter)

    def context_after(self, context: CostContext) -> CostContext:
        """Return the context after the step: the head is a tensor of its own."""
        return context.with_edited_weights().with_student(tie_word_embeddings=False)

    def caveats(self) -> list[Caveat]:
        """Return that the regression is not regularised, where its ridge is as good as none."""
        return ridge_caveats(self.ridge)

    def check_models(self, pair: Pair) -> None:
        """Raise what two tokenizers would end with.

        Raises:
            SetupError: they give different ids to the same tokens.
        """
        require_one_vocabulary(pair)

    @hookimpl
    def style(
        self,
        weights: Weights,
        activations: ActivationStore,
        pair: Pair,
        samples: Samples,
        out: StepOutput,
        progress: Progress,
        ranks: Ranks | None = None,
    ) -> Weights:
        """See `HookSpecs.style`."""
        from rotdistill_lm_head_ridge._method import fit_head

        return fit_head(self, weights, activations, pair, samples, out, progress, ranks or ALONE)


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [LmHeadRidge]
