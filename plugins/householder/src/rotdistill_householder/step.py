"""The step `householder`: reflections that improve a rotation of the residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from rotdistill_core import hookimpl, step
from rotdistill_core.planning.cost import Cost, CostContext, alignment_cost

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.linalg.maps import Maps
    from rotdistill_core.store.output import StepOutput


@step
class Householder:
    """Reflect the rotation of each stage if that brings the mapped student nearer to the teacher.

    A stage is a run of layer boundaries that share their rotation. Reflections are fitted on fit
    texts; one that does not raise the validation cosine is rejected. After a free Procrustes no
    reflection helps: the step reports that and changes nothing.
    """

    use: Literal["householder"] = "householder"
    max_reflections: Annotated[int, Field(ge=1, le=2)] = 2
    """Maximum number of reflections per stage."""
    target: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Stop at this mean cosine of validation rows."""

    def cost(self, context: CostContext) -> Cost:
        """Moments of paired rows, and two solves for each stage of the aligner before."""
        return alignment_cost(context, max(context.stages, 1))

    @hookimpl
    def refine(
        self,
        activations: ActivationStore,
        maps: Maps,
        pair: Pair,
        out: StepOutput,
        progress: Progress,
    ) -> Maps:
        """See `HookSpecs.refine`."""
        from rotdistill_householder._method import solve

        return solve(self, activations, maps, pair, out, progress)


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [Householder]
