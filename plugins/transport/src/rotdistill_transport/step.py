"""The step `transport`: its options and its cost. The mathematics is in `_carry` and `_spaces`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from rotdistill_core import hookimpl, step
from rotdistill_core.data.splits import Split
from rotdistill_core.data.vocabularies import require_one_vocabulary
from rotdistill_core.errors import SetupError
from rotdistill_core.evaluation.guard import Guard, is_guarded
from rotdistill_core.forward.ranks import ALONE
from rotdistill_core.planning.cost import (
    FLOAT64_BYTES,
    Cost,
    CostContext,
    acceptance_cost,
    answer_rows,
    assignment_cost,
    scoring_cost,
    teacher_states_cost,
)
from rotdistill_core.plugin.caveats import Caveat, CaveatKind

if TYPE_CHECKING:
    from rotdistill_core import (
        ActivationStore,
        Maps,
        Pair,
        Progress,
        Ranks,
        Samples,
        StepOutput,
        Weights,
    )

Strength = Annotated[float, Field(gt=0, le=10)]
OF_RECIPE = ("teacher", "student")
"""Names of the recipe's own models, as it opened them."""
SCORED_ROWS = 1024
"""Largest number of rows of a split on which a strength is scored."""
CONTROLS = {
    "random": "The fine-tune was carried by random maps: a control.",
    "shuffled": "The rows of the fine-tune's changes were in another order: a control.",
}


@step
class Transport:
    """Carry a fine-tune or a LoRA of one model into the student, in closed form.

    The student may have another basis, width, depth, or number of heads and neurons than the model
    that was fine-tuned. The strength is chosen on validation texts; the student is left as it is
    where none of them lowers the KL to the teacher by more than chance. So the teacher of the
    recipe should be what the fine-tune was made for, or the fine-tune itself.
    """

    use: Literal["transport"] = "transport"
    source: str
    """The fine-tune: folder of a LoRA in peft's format, or a whole model (a folder, a hub id,
    `run:NAME/VARIANT`), or `teacher` for the recipe's."""
    base: str | None = None
    """The model that the fine-tune started from: `student` or `teacher` for the recipe's own as
    they were opened, or another reference. Without it, what the LoRA itself names."""
    strengths: Annotated[tuple[Strength, ...], Field(min_length=1)] = (
        0.25,
        0.5,
        0.75,
        1.0,
        1.25,
        1.5,
        2.0,
    )
    """Candidates for the factor of the change, rising. 0, the student as it is, is always one. Of a
    student without some layers the change is tried without those before the first cut, too."""
    rank: PositiveInt | None = None
    """Reduce the change of each matrix to this rank by SVD; the notes give the error. With it, a
    whole model leaves a LoRA too."""
    guard: Guard | None = None
    """Apply only so much of the change (all, 1/2, 1/4, 1/10) that the KL on the guard's validation
    half is at most this multiple of the KL before, or 0.05 nats; the reported half may differ. By
    default 1.02 (2 % worse) where the recipe has guard texts; `"off"` for no limit."""
    require_improvement: bool = True
    """`false`: apply the one strength that is given, whatever it does. It needs no texts."""
    control: Literal["none", "random", "shuffled"] = "none"
    """Negative control. `"random"`: random maps in place of all found ones. `"shuffled"`: the rows
    of every change in another order. A gain that remains does not come from the fine-tune."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the controls."""

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse strengths that do not rise, and several where none is chosen."""
        if sorted(set(self.strengths)) != list(self.strengths):
            raise ValueError("strengths must rise")
        if not self.require_improvement and len(self.strengths) != 1:
            raise ValueError(
                "require_improvement = false applies one strength, and chooses none; "
                f"{len(self.strengths)} are given"
            )

    def inputs(self) -> list[str]:
        """Return the content of the fine-tune and of its base, on which the result depends too."""
        from rotdistill_core.checkpoint.references import content_digest
        from rotdistill_transport._source import base_that_is_here

        base = self.base
        if not base and self.source not in OF_RECIPE:
            base = base_that_is_here(self.source)
        names = [name for name in (self.source, base) if name]
        return [name if name in OF_RECIPE else content_digest(name) for name in names]

    def check_models(self, pair: Pair) -> None:
        """Raise what the fine-tune and its base would end with, as far as files tell.

        Raises:
            RecipeError: the base is not known, or another kind of model than the fine-tune.
            SetupError: a model is missing or torn, the LoRA is none that can be carried, or the
                vocabularies differ.
        """
        from rotdistill_transport._source import open_source

        require_one_vocabulary(pair)
        open_source(self, pair)

    def cost(self, context: CostContext) -> Cost:
        """The matching of heads and neurons, one layer after the other, and the scores.

        The strengths are scored one after the other, from 1 downhill, all of them at worst. One
        score more is of the change without the layers before a cut.
        """
        student = context.student
        cost = replace(assignment_cost(context), disk_bytes=self._disk_bytes(context))
        # The embeddings of both models give the map of the stream.
        sums = (student.width**2 + student.width * context.teacher.width) * FLOAT64_BYTES
        cost = replace(cost, host_bytes=cost.host_bytes + sums)
        if not self.require_improvement:
            return cost
        rows = context.texts.rows_of(Split.VALIDATION)
        scored = min(answer_rows(context, Split.VALIDATION), SCORED_ROWS)
        tried = scoring_cost(context, rows, scored).repeated(len(self.strengths) + 1)
        read = context.texts.as_teacher_reads.rows_of(Split.VALIDATION)
        guarded = is_guarded(self.guard, context.texts)
        states = teacher_states_cost(context, read, ("transport", Split.VALIDATION))
        if guarded:
            outside = context.texts.as_teacher_reads.rows_of(Split.GUARD_VALIDATION)
            states += teacher_states_cost(context, outside, ("transport", Split.GUARD_VALIDATION))
        accepted = acceptance_cost(context, guarded, SCORED_ROWS)
        return cost + states.dealt() + tried + accepted

    def context_after(self, context: CostContext) -> CostContext:
        """Weights are edited; a whole model's change is one of the embedding too, which unties the
        head."""
        edited = context.with_edited_weights()
        return edited if self._lora_bytes() else edited.with_student(tie_word_embeddings=False)

    def _disk_bytes(self, context: CostContext) -> float:
        """Return what is written: the edited weights, and the change as a file of its own.

        A LoRA edits matrices of layers. A whole model may have changed everything.
        """
        number = context.student_bytes
        lora = self._lora_bytes()
        if lora:
            return context.student.parameters(inside=True) * number + lora
        student = context.student.changed(tie_word_embeddings=False)
        weights = student.parameters() * number
        if not self.rank:
            return 2 * weights
        sizes = student.adapter.sizes(student.config)
        tables = student.adapter.expand(student.config).values()
        ends = sum(sum(sizes[axis] for axis in p.axes) for p in tables if len(p.axes) == 2)
        return weights + self.rank * ends * number

    def _lora_bytes(self) -> int:
        """Return the size of the LoRA that is carried; 0 for a whole model, and for one that is
        not there, which `check_models` refuses."""
        from rotdistill_core.checkpoint.open import locate_model
        from rotdistill_core.checkpoint.references import is_adapter, reference_of

        if self.source in OF_RECIPE:
            return 0
        try:
            folder = locate_model(reference_of(self.source))
        except SetupError:
            return 0
        if not is_adapter(folder):
            return 0
        return sum(path.stat().st_size for path in folder.glob("adapter_*"))

    def caveats(self) -> list[Caveat]:
        """Return why a control is not to be trusted."""
        if self.control == "none":
            return []
        return [Caveat(CaveatKind.CONTROL, CONTROLS[self.control])]

    @hookimpl
    def fold(
        self,
        weights: Weights,
        maps: Maps,
        pair: Pair,
        samples: Samples,
        out: StepOutput,
        progress: Progress,
        activations: ActivationStore | None = None,
        ranks: Ranks | None = None,
    ) -> Weights:
        """See `HookSpecs.fold`. Captured states are used for the layer map if there are any."""
        from rotdistill_transport._method import carry
        from rotdistill_transport._spaces import Target

        target = Target(weights=weights, pair=pair, maps=maps, activations=activations)
        return carry(self, target, samples, out, progress, ranks or ALONE)


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [Transport]
