"""The step `hungarian-permute`: which head and neuron of one model is which of another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from rotdistill_core import hookimpl, step
from rotdistill_core.planning.cost import Cost, CostContext, assignment_cost
from rotdistill_hungarian_permute._cost import activation_cost

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.data.packed import Samples
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.linalg.maps import Maps
    from rotdistill_core.store.output import StepOutput


@step
class HungarianPermute:
    """Match the student's heads and SwiGLU neurons with those of the teacher's layer at its depth.

    Between layers of one shape the maps are permutations, which `basis-fold` folds exactly. Between
    different shapes they are assignments for blending. The diagnostics compare each assignment with
    the identity and with chance.
    """

    use: Literal["hungarian-permute"] = "hungarian-permute"
    criterion: Literal["weights", "activations"] = "weights"
    """`"weights"`: QK and OV circuits; gate, up and down. Models of different width
    need a map of the stream before it. `"activations"`: attention maps; correlation of the input of
    `down_proj`."""
    within_stage: PositiveInt = 1
    """A layer may be matched with any teacher layer of its stage of this many layers, one to one
    (1: the one at its depth)."""
    max_texts: PositiveInt = 32
    """Maximum number of fit texts from which the activations are taken."""

    def cost(self, context: CostContext) -> Cost:
        """Each student layer of a stage with each teacher layer of it, by weights or on texts."""
        context = context.for_alignment
        if self.criterion == "weights":
            return assignment_cost(context, self._pairs(context))
        return activation_cost(context, self.max_texts, self.within_stage, self._pairs(context))

    def _pairs(self, context: CostContext) -> int:
        """Return how many pairs of layers are compared; the last stage may be shorter."""
        whole_stages, rest = divmod(context.student.depth, self.within_stage)
        return whole_stages * self.within_stage**2 + rest**2

    def context_after(self, context: CostContext) -> CostContext:
        """It finds no rotation of the stream."""
        return context

    @hookimpl
    def align(
        self,
        weights: Weights,
        maps: Maps,
        pair: Pair,
        samples: Samples,
        out: StepOutput,
        progress: Progress,
    ) -> Maps:
        """See `HookSpecs.align`."""
        from rotdistill_hungarian_permute._method import solve

        return solve(self, weights, maps, pair, samples, out, progress)


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [HungarianPermute]
