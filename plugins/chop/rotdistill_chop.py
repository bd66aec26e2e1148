"""Cut layers out of the student."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from rotdistill_core import hookimpl, step

if TYPE_CHECKING:
    from rotdistill_core.api import Out, Pair, Progress, Samples, Weights

ROWS = 2048


@step
class Chop:
    """Keep some of the student's layers.

    Given a number, the run of layers is cut whose input and output differ least in angle on the samples
    (Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, arXiv:2403.17887).
    """

    use: Literal["chop"] = "chop"
    layers: PositiveInt | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    """How many layers stay, or which (numbered from 0)."""
    texts: PositiveInt = 24
    """On how many fit texts the angles are measured."""

    exact: ClassVar[bool] = False

    @hookimpl
    def fold(self, weights: Weights, pair: Pair, samples: Samples, out: Out, progress: Progress) -> Weights:
        """See `Specs.fold`."""
        from rotdistill_core.errors import RecipeError

        depth = weights.depth
        if isinstance(self.layers, list):
            keep = self.layers
            if sorted(set(keep)) != keep or keep[-1] >= depth:
                raise RecipeError(f"chop: layers must rise and stay below {depth}, the student's depth.")
        elif self.layers > depth:
            raise RecipeError(f"chop: layers = {self.layers}, but the student has {depth}.")
        else:
            keep = self._choose(weights, depth - self.layers, pair, samples, out, progress)
        out.notes["layers kept"] = keep
        return weights.cut(keep)

    def _choose(self, weights: Weights, drop: int, pair: Pair, samples: Samples, out: Out, progress: Progress) -> list[int]:
        import torch

        from rotdistill_core.walk import Walk

        depth = weights.depth
        if drop == 0:
            return list(range(depth))
        if depth - drop < 2:
            return list(range(depth - drop))
        walk = Walk(weights, samples.layout.select("fit", most=self.texts), pair.student.device, pair.student.dtype)
        # Rows of the shared prompt are left out: they are few, and position 0 is an attention sink.
        some = torch.arange(walk.layout.prefix, walk.layout.rows)
        some = some[:: max(1, len(some) // ROWS)]
        recent = [walk.states[some]]
        angles: dict[int, float] = {}
        for i in walk:
            walk.run()
            recent.append(walk.states[some])
            if len(recent) > drop:
                before = recent.pop(0)
                cosine = torch.cosine_similarity(before.double(), recent[-1].double(), dim=-1).clamp(-1, 1)
                angles[i + 1 - drop] = float(cosine.acos().mean())
            progress(i + 1, depth, f"angles on {len(some)} rows")
        out.notes["angle over the cut, by first layer"] = angles
        cut = min(range(1, depth - drop), key=angles.__getitem__)
        return [*range(cut), *range(cut + drop, depth)]


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [Chop]
