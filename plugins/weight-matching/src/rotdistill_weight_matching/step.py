"""The step `weight-matching`: align two models of one shape from their weights alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from rotdistill_core import hookimpl, step
from rotdistill_core.planning.cost import (
    FLOAT64_BYTES,
    SVD_OPERATIONS,
    Cost,
    CostContext,
    assignment_cost,
)
from rotdistill_core.planning.shape import DTYPE_BYTES
from rotdistill_weight_matching._cost import VOCABULARY_ROWS, gauge_cost

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
        """Rounds of assignments and one rotation, after the moments of embedding and head.

        Moments of every layer stay in memory until the rotation of the round is solved.
        """
        context = context.for_alignment
        student, teacher = context.student, context.teacher
        width, depth = student.width, student.depth
        layers = assignment_cost(context)
        gauges = gauge_cost(context)
        square = width**2 * FLOAT64_BYTES
        vocabulary = 2 * student.vocab * width
        block = 2 * min(student.vocab, VOCABULARY_ROWS) * width * FLOAT64_BYTES
        # Moments of a layer, and the polar factor of their sum.
        products = 2.0 * depth * student.layer_parameters * width
        solve = SVD_OPERATIONS * width**3
        return Cost(
            host_bytes=max(layers.host_bytes, gauges.host_bytes, block) + (depth + 6) * square,
            disk_bytes=layers.disk_bytes + gauges.disk_bytes + square,
            operations=2.0 * vocabulary * width
            + solve
            + self.max_rounds * (layers.operations + gauges.operations + products + solve),
            read_bytes=vocabulary * (DTYPE_BYTES[student.stored] + DTYPE_BYTES[teacher.stored])
            + self.max_rounds * layers.read_bytes,
        )

    def context_after(self, context: CostContext) -> CostContext:
        """One rotation for the whole stream."""
        return replace(context, stages=1)

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
