"""The step `procrustes`: a rotation of the student's residual stream onto the teacher's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt

from rotdistill_core import hookimpl, step
from rotdistill_core.planning.cost import Cost, CostContext, alignment_cost, stage_count

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.linalg.maps import Maps


@step
class Procrustes:
    """Find the rotation that maps the student's residual stream onto the teacher's.

    Rows are divided by their RMS; position 0 and massive-activation rows are left out. The solve
    uses fit texts. The cosines in the diagnostics are on validation texts, next to those of
    shuffled teacher rows, of a random rotation and of the teacher's mean.
    """

    use: Literal["procrustes"] = "procrustes"
    tie: PositiveInt | Literal["all"] = "all"
    """`"all"`: one rotation for the whole stream. A number n: one per stage of n layer boundaries
    (1: every boundary its own)."""
    shrink: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the student's width whose principal directions are solved apart from the rest,
    against noise. 1: one solve for all directions."""
    whiten: Literal["none", "zscore", "full"] = "none"
    """`"none"`: rows as they are. `"zscore"`: every channel counts alike, in the teacher's
    coordinates. `"full"`: every direction counts alike."""
    ridge: Annotated[float, Field(ge=0)] = 0.0
    """Added to the covariances before whitening, as a multiple of their mean diagonal. Refused
    without whitening."""

    def cost(self, context: CostContext) -> Cost:
        """Moments of paired rows, and two solves for each stage."""
        return alignment_cost(context, stage_count(context, self.tie))

    def context_after(self, context: CostContext) -> CostContext:
        """Each stage has a rotation of its own."""
        return replace(context, stages=stage_count(context, self.tie))

    @hookimpl
    def align(
        self, activations: ActivationStore, maps: Maps, pair: Pair, progress: Progress
    ) -> Maps:
        """See `HookSpecs.align`."""
        from rotdistill_procrustes._method import solve

        return solve(self, activations, maps, pair, progress)


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [Procrustes]
