"""The step `residuals`: capture the residual streams of teacher and student."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from rotdistill_core import hookimpl, step
from rotdistill_core.forward.ranks import ALONE
from rotdistill_core.planning.cost import Cost, CostContext
from rotdistill_core.plugin.caveats import Caveat, CaveatKind
from rotdistill_residuals._cost import moments_cost, rows_cost
from rotdistill_residuals._tokenizers import require_pairs

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.data.packed import Samples
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.forward.ranks import Ranks
    from rotdistill_core.store.output import StepOutput

CONTROLS = {
    "shuffled": "the teacher's rows are shuffled on purpose: there is nothing to learn from them.",
    "self": "the student is its own teacher on purpose: there is nothing to learn.",
    "reversed": "the layer map is reversed on purpose: every layer is paired with a wrong one.",
}
"""Control -> why a run with it is not to be trusted."""


@step
class Residuals:
    """Run teacher and student once over all texts and keep the residual stream at every boundary.

    Boundary 0 is the embeddings, boundary `l` the stream after layer `l`. Runs under one folder
    with the same `student_texts` share the teacher's shards, whatever other steps do to the
    student. Put a `chop` before this step and every other edit after it.
    """

    use: Literal["residuals"] = "residuals"
    dtype: Literal["float32", "bfloat16", "compute"] = "compute"
    """Dtype of the shards. `compute` is the dtype of the forward pass."""
    store: Literal["rows", "moments"] = "rows"
    """What is kept. `"rows"`: rows of texts, of which ones `student_texts` says. `"moments"`: exact
    sums over the rows to fit on, and the rows of held-out texts, of the first 24 texts to fit on
    and of the first 8 for validation, with the final states of the guard; memory and disk do not
    grow with the number of texts. `control` needs `"rows"`."""
    student_texts: Annotated[int, Field(ge=1)] | None = None
    """Number of fit and validation texts on which the student is captured (alignment needs few);
    without it, all of them. Of those beyond, and of the guard, only the teacher's final states are
    kept, unless there is a `control`."""
    layer_map: Literal["stretch", "match"] = "stretch"
    """Which teacher boundary each student boundary is compared with. `"stretch"`: the one at the
    same relative depth. `"match"`: the monotone map under which the student's rows explain most of
    the teacher's variance (table of R² in `layer_map.json`)."""
    control: Literal["none", "shuffled", "reversed", "self"] = "none"
    """Negative control: replaces the teacher's rows of fit and validation texts. `"shuffled"`: by
    the same rows in another order; `"reversed"`: by those of the layers in reverse order; `"self"`:
    by the student's own. A gain on held-out texts that remains does not come from the teacher (see
    `recipes/controls.toml`)."""

    def __post_init__(self) -> None:
        """Refuse a control of sums: it replaces rows."""
        if self.store == "moments" and self.control != "none":
            raise ValueError(
                f'control = "{self.control}" replaces rows of the teacher, which '
                'store = "moments" does not keep; set store = "rows"'
            )

    @property
    def keeps_all_rows(self) -> bool:
        """Whether later steps find the teacher's rows of all texts at every boundary."""
        return self.store == "rows" and (self.student_texts is None or self.control != "none")

    def cost(self, context: CostContext) -> Cost:
        """All models on their texts; runs under one folder share the shards of the teacher and of
        an anchor on the same texts."""
        return rows_cost(self, context) if self.store == "rows" else moments_cost(self, context)

    def context_after(self, context: CostContext) -> CostContext:
        """Later steps find sums, or rows."""
        return replace(context, sums=self.store == "moments")

    def caveats(self) -> list[Caveat]:
        """Return why a run with the control is not to be trusted."""
        if self.control == "none":
            return []
        return [Caveat(CaveatKind.CONTROL, CONTROLS[self.control])]

    def check_models(self, pair: Pair) -> None:
        """Raise what pairing two vocabularies would end with, as far as files tell.

        Raises:
            SetupError: the vocabularies differ, and the tokens of one are not bytes.
        """
        require_pairs((pair.teacher.folder, pair.student.folder))

    @hookimpl
    def capture(
        self,
        pair: Pair,
        weights: Weights,
        samples: Samples,
        out: StepOutput,
        progress: Progress,
        ranks: Ranks | None = None,
    ) -> ActivationStore:
        """See `HookSpecs.capture`."""
        from rotdistill_residuals._method import capture

        return capture(self, pair, weights, samples, out, progress, ranks or ALONE)


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [Residuals]
