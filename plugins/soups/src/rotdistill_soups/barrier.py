"""The `interpolation-barrier` step: options, cost, and the hook."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from rotdistill_core import hookimpl, step
from rotdistill_core.planning.cost import Cost, CostContext
from rotdistill_core.store.results import CURVE_OF_VARIANT
from rotdistill_soups._cost import barrier_cost

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.data.packed import Samples
    from rotdistill_core.evaluation.rows import MetricRow, Variant
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.store.output import StepOutput


@step
class InterpolationBarrier:
    """Measure the KL to the teacher on straight lines between checkpoints of one shape.

    It shows whether they can be averaged, whatever their bases. The row `barrier` is how far the KL
    rises above its chord on the worst line; the report plots the lines.
    """

    use: Literal["interpolation-barrier"] = "interpolation-barrier"
    between: Annotated[tuple[str, ...], Field(min_length=2)]
    """The ends of the lines, each with each: checkpoints or LoRA folders as in `soups`, and
    `variant` for the variant that is scored."""
    points: Annotated[int, Field(ge=3)] = 11
    """Points on a line, both ends included."""
    split: Literal["heldout", "validation"] = "heldout"
    """The split whose answers are scored."""

    def inputs(self) -> list[str]:
        """Return the content of the ends, on which the result depends too."""
        from rotdistill_soups._ingredients import digest_of

        return [end if end == CURVE_OF_VARIANT else digest_of(end) for end in self.between]

    def check_models(self, pair: Pair) -> None:
        """Refuse ends that have no line to the student, before any work."""
        from rotdistill_soups._ingredients import check_ingredients

        ends = [end for end in self.between if end != CURVE_OF_VARIANT]
        check_ingredients(ends, pair)

    def cost(self, context: CostContext) -> Cost:
        """A pass for each end and each point between two of them, on the texts of the split."""
        return barrier_cost(context, self.split, ends=len(self.between), points=self.points)

    @hookimpl
    def evaluate(
        self, variant: Variant, pair: Pair, samples: Samples, out: StepOutput, progress: Progress
    ) -> list[MetricRow]:
        """See `HookSpecs.evaluate`."""
        from rotdistill_soups._barrier import measure_barriers

        return measure_barriers(self, variant, pair, samples, out, progress)


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [InterpolationBarrier]
