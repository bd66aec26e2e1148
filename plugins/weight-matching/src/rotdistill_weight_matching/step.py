"""The step `weight-matching`: align two models of one shape from their weights alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from rotdistill_core import hookimpl, step
from rotdistill_core.planning.cost import Cost, CostContext, assignment_cost

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.linalg.maps import Maps
    from rotdistill_core.store.output import StepOutput


@step
class WeightMatching:
    """Align two models of one shape from weights: stream, heads, neurons, and gauges inside them.

    A student cut in depth is compared with the layers that it kept. Both models share their
    vocabulary, so embedding and head give the first rotation. No capture is needed.
    """

    use: Literal["weight-matching"] = "weight-matching"
    max_rounds: PositiveInt = 10
    """Maximum number of rounds of rotation, assignment and gauges. It stops when nothing
    changes."""
    value_gauge: Literal["orthogonal", "invertible"] = "orthogonal"
    """Which matrices the gauge between v and o may be: orthogonal ones, or any invertible one."""

    def cost(self, context: CostContext) -> Cost:
        """Two layers at a time, and the similarities of their heads and neurons."""
        return assignment_cost(context)

    @hookimpl
    def align(
        self, weights: Weights, maps: Maps, pair: Pair, out: StepOutput, progress: Progress
    ) -> Maps:
        """See `HookSpecs.align`."""
        from rotdistill_weight_matching._method import solve

        return solve(self, weights, maps, pair, out, progress)


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [WeightMatching]
