"""The step `random-rotation`: the control of every aligner, rotations that ignore the models."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from rotdistill_core import hookimpl, step
from rotdistill_core.planning.cost import FLOAT64_BYTES, Cost, CostContext, stage_count
from rotdistill_core.plugin.caveats import Caveat, CaveatKind

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.linalg.maps import Maps


@step
class RandomRotation:
    """Map the student's stream onto the teacher's by a random `R [d_s, d_t]`, `R Rᵀ = I`.

    It is the control: an aligner is worth something only where it beats this.
    """

    use: Literal["random-rotation"] = "random-rotation"
    tie: Literal[1, "all"] = "all"
    """`"all"`: one rotation for all layers, which can be folded. 1: one for each."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the random numbers."""

    def cost(self, context: CostContext) -> Cost:
        """One QR decomposition of Gaussian noise for each rotation."""
        width = context.for_alignment.teacher.width
        rotations = stage_count(context, self.tie) * context.student.width * width * FLOAT64_BYTES
        return Cost(
            host_bytes=4 * width**2 * FLOAT64_BYTES + rotations,
            disk_bytes=rotations,
            operations=4.0 * width**3 * stage_count(context, self.tie),
        )

    def caveats(self) -> list[Caveat]:
        """Return that the map is random on purpose."""
        return [Caveat(CaveatKind.RANDOM_MAP, "the map is random on purpose.")]

    def context_after(self, context: CostContext) -> CostContext:
        """One rotation for all layers, or one for each."""
        return replace(context, stages=stage_count(context, self.tie))

    @hookimpl
    def align(self, weights: Weights, maps: Maps, pair: Pair) -> Maps:
        """See `HookSpecs.align`."""
        from rotdistill_procrustes._random_rotation import solve

        return solve(self, weights, maps, pair)


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [RandomRotation]
