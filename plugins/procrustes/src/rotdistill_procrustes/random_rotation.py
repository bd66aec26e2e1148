"""The control of every aligner: rotations that have never seen the models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from rotdistill_core import hookimpl, step
from rotdistill_core.planning.cost import FLOAT64_BYTES, Cost, CostContext

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.linalg.maps import Map, Maps


@step
class RandomRotation:
    """Map the student's stream onto the teacher's by a random `R [d_s, d_t]`, `R Rᵀ = I`: what alignment has to beat."""

    use: Literal["random-rotation"] = "random-rotation"
    tie: Literal[1, "all"] = "all"
    """`"all"`: one rotation for all layers, which can be folded. 1: one for each."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the rotation."""

    def cost(self, context: CostContext) -> Cost:
        """One decomposition of a square matrix of the teacher's width."""
        width = context.teacher.width
        return Cost(
            host_bytes=4 * width**2 * FLOAT64_BYTES,
            disk_bytes=context.student.width * width * FLOAT64_BYTES,
            operations=4.0 * width**3,
        )

    @hookimpl
    def align(self, weights: Weights, maps: Maps, pair: Pair) -> Maps:
        """See `Specs.align`."""
        import torch

        from rotdistill_core.errors import RecipeError
        from rotdistill_core.linalg.maps import Rotation

        d, e = weights.width, pair.teacher.width
        if d > e:
            raise RecipeError(
                f"random-rotation: the student is wider ({d}) than the teacher ({e})."
            )
        maker = torch.Generator().manual_seed(self.seed)
        found: dict[str, Map] = {}
        for boundary in range(weights.depth + 1):
            if boundary == 0 or self.tie == 1:
                R = Rotation(
                    torch.linalg.qr(
                        torch.randn(e, d, dtype=torch.float64, generator=maker)
                    ).Q.T.contiguous()
                )
            found[f"residual.{boundary}"] = R
        return maps.add(found, {})


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [RandomRotation]
