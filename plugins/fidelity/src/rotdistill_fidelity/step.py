"""Options of `fidelity`: score variants by their agreement with the teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from rotdistill_core import hookimpl, step
from rotdistill_core.data.splits import Split
from rotdistill_core.forward.ranks import ALONE
from rotdistill_core.planning.cost import (
    FLOAT64_BYTES,
    Cost,
    CostContext,
    evaluation_cost,
    teacher_states_cost,
)

if TYPE_CHECKING:
    from rotdistill_core import (
        ActivationStore,
        MetricRow,
        Pair,
        Progress,
        Ranks,
        Samples,
        StepOutput,
        Variant,
    )


@step
class Fidelity:
    """Compare each saved variant with the teacher on held-out answers.

    Predictions: `kl` (nats per answer token, over the shared vocabulary), `top1` agreement, and
    `perplexity` of the teacher's answers.

    Hidden states, per layer and on average: `hidden_cosine`, `residual_rms_diff` (relative to the
    teacher's RMS) and `channel_rms_gap` (mean absolute log ratio of each channel's RMS to the
    teacher's). They are compared in the teacher's frame. The variant's change of basis is undone
    first. Between models of different bases, the best rotation of each layer is then applied,
    fitted to the unedited student on the fit texts.

    Outside the domain, on the guard's reported half: `guard_kl` and `guard_perplexity` of every
    token.

    With `samples.bake_prompt`, variants read no system prompt, and the teacher they are compared
    with does. `kl_teacher` and `top1_teacher` compare the teacher without the prompt with itself:
    what the prompt's absence costs before anything is taught.

    Size and time: `parameters`, `seconds`.

    `kl`, `top1` and `guard_kl` are reported by text too. From these rows of `results.jsonl` the
    report computes 95 % intervals; `n` is a text's weight in the mean.
    """

    use: Literal["fidelity"] = "fidelity"
    per_layer: bool = True
    """Report hidden states layer by layer, not only on average."""

    def cost(self, context: CostContext) -> Cost:
        """One pass of the variant over held-out texts, and both heads.

        Variants share the rotations in which hidden states of two bases are compared.
        """
        cost = evaluation_cost(context).dealt()
        if context.texts.teacher_prefix is not None:
            rows = context.texts.rows_of(Split.HELDOUT)
            cost += teacher_states_cost(context, rows, "without the system prompt").dealt()
        if context.same:
            return cost
        student, teacher = context.student, context.teacher
        rotations = (student.depth + 1) * student.width * teacher.width * FLOAT64_BYTES
        return replace(cost, shared_files={**cost.shared_files, "fidelity frames": rotations})

    @hookimpl
    def evaluate(
        self,
        variant: Variant,
        pair: Pair,
        activations: ActivationStore,
        samples: Samples,
        out: StepOutput,
        progress: Progress,
        ranks: Ranks | None = None,
    ) -> list[MetricRow]:
        """See `HookSpecs.evaluate`."""
        from rotdistill_fidelity._method import score_variant

        return score_variant(
            self, variant, pair, activations, samples, out, progress, ranks or ALONE
        )


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [Fidelity]
