"""The step `cca`: a rotation that maps the directions which student and teacher share."""

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
class Cca:
    """Map the student's canonical directions onto the teacher's, and the rest by Procrustes.

    It uses the rows that `procrustes` uses and gives the same diagnostics; their singular values
    are the canonical correlations. In a recipe it replaces `procrustes` by one word.
    """

    use: Literal["cca"] = "cca"
    tie: PositiveInt | Literal["all"] = "all"
    """`"all"`: one rotation for the whole stream. A number n: one per stage of n layer boundaries
    (1: every boundary its own)."""
    shrinkage: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share γ of an isotropic covariance of the same trace that is mixed into each side's
    covariance."""
    min_correlation: Annotated[float, Field(ge=0, le=1)] | None = None
    """Pairs of directions are shared above this canonical correlation. Without it: above the
    largest one that shuffled rows reach."""

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
        from rotdistill_procrustes._cca import solve

        return solve(self, activations, maps, pair, progress)


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [Cca]
