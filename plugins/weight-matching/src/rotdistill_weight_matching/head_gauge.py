"""The step `head-gauge`: solve what is still free inside matched heads and neurons."""

from __future__ import annotations

from dataclasses import field, replace
from typing import TYPE_CHECKING, Literal

from rotdistill_core import hookimpl, step
from rotdistill_core.planning.cost import Cost, CostContext
from rotdistill_weight_matching._cost import gauge_cost

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.linalg.maps import Maps
    from rotdistill_core.store.output import StepOutput


@step
class HeadGauge:
    """Solve the gauges inside the student's heads and neurons against the teacher's layer.

    They are in closed form and exact to fold. It needs the assignments of `hungarian-permute`, and
    a map of the stream where the models have no common basis.
    """

    use: Literal["head-gauge"] = "head-gauge"
    gauges: list[Literal["value", "key", "up"]] = field(
        default_factory=lambda: ["value", "key", "up"]
    )
    """Gauges to solve: `value` between v and o, `key` between q and k, `up` between up and
    down."""
    value_gauge: Literal["orthogonal", "invertible"] = "orthogonal"
    """Which matrices the gauge between v and o may be: orthogonal ones, or any invertible one."""

    def cost(self, context: CostContext) -> Cost:
        """Two layers at a time in one basis; each gauge is solved twice, once for the null."""
        context = context.for_alignment
        student = context.student
        once = gauge_cost(context, self.gauges)
        # The student's layer is taken into the teacher's basis first.
        rotation = 2.0 * student.depth * student.layer_parameters * context.teacher.width
        return replace(once, operations=2 * once.operations + rotation)

    def context_after(self, context: CostContext) -> CostContext:
        """It finds no rotation of the stream."""
        return context

    @hookimpl
    def align(
        self, weights: Weights, maps: Maps, pair: Pair, out: StepOutput, progress: Progress
    ) -> Maps:
        """See `HookSpecs.align`."""
        from rotdistill_weight_matching._head_gauge import solve

        return solve(self, weights, maps, pair, out, progress)


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [HeadGauge]
