"""How far the loss rises on the straight line between two checkpoints: whether they can be averaged at all.

`L(t)` is the loss of `(1 - t) A + t B`, and the barrier `max_t L(t) - (1 - t) L(0) - t L(1)`. (Frankle et al., Linear Mode Connectivity
and the Lottery Ticket Hypothesis, arXiv:1912.05671.) It is never below 0, and 0 where the line nowhere lies above its ends' chord.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from rotdistill_core import hookimpl, step
from rotdistill_core.planning.cost import Cost, CostContext, evaluation_cost

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.data.packed import Samples
    from rotdistill_core.evaluation.rows import MetricRow, Variant
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.store.output import StepOutput


VARIANT = "variant"


@step
class InterpolationBarrier:
    """Walk the lines between checkpoints of one shape and report the KL to the teacher along them, whatever their bases.

    Row `barrier` says how far the KL rises above its chord, the notes have the lines. Whether they can be averaged shows here.
    """

    use: Literal["interpolation-barrier"] = "interpolation-barrier"
    between: Annotated[tuple[str, ...], Field(min_length=2)]
    """The ends, each with each: checkpoints or LoRA folders as in `soups`, and `variant` for the variant that is judged."""
    points: Annotated[int, Field(ge=3)] = 11
    """Points on a line, the ends counted."""
    split: Literal["heldout", "validation"] = "heldout"
    """Whose answers the KL is of."""

    def inputs(self) -> list[str]:
        """Return what the result depends on beside the options: the content of the ends."""
        from rotdistill_soups._ingredients import content

        return [
            reference if reference == VARIANT else content(reference) for reference in self.between
        ]

    def cost(self, context: CostContext) -> Cost:
        """The variant on held-out texts, and both heads."""
        return evaluation_cost(context)

    @hookimpl
    def evaluate(
        self, variant: Variant, pair: Pair, samples: Samples, out: StepOutput, progress: Progress
    ) -> list[MetricRow]:
        """See `Specs.evaluate`."""
        from rotdistill_core.evaluation.rows import MetricRow
        from rotdistill_core.store.results import Curve
        from rotdistill_soups._ingredient_set import IngredientSet
        from rotdistill_soups._ingredients import STUDENT
        from rotdistill_soups._kl_scorer import KLScorer
        from rotdistill_soups.step import Soups

        names = [STUDENT if reference == VARIANT else reference for reference in self.between]
        gathering = IngredientSet(names, variant.weights, pair, out, progress)
        ends = dict(zip(self.between, gathering.all("ignore", None), strict=True))
        judge, steps, lines = (
            KLScorer(pair, samples, self.split, out, progress),
            self.points - 1,
            [],
        )
        pairs = list(combinations(ends, 2))
        alone = {name: judge(part.view).mean for name, part in ends.items()}
        for number, (one, two) in enumerate(pairs):
            loss = [alone[one]]
            for k in range(1, steps):
                mix = Soups(
                    ingredients=(one, two), weights=(1 - k / steps, k / steps), only_better=False
                )
                loss.append(judge(mix.merged(gathering.base, [ends[one], ends[two]])).mean)
                progress(
                    number * steps + k, len(pairs) * steps, f"{one} to {two}: KL {loss[-1]:.4f}"
                )
            lines.append(_line(one, two, [*loss, alone[two]]))
        out.report.curves = [
            Curve(
                start=line["from"],
                end=line["to"],
                positions=tuple(line["t"]),
                losses=tuple(line["loss"]),
            )
            for line in lines
        ]
        out.notes["barriers"] = {
            f"{line['from']} to {line['to']}": {"barrier": line["barrier"], "at": line["at"]}
            for line in lines
        }
        rows = int(judge.rows.numel())
        return [
            MetricRow(
                variant.name,
                "barrier",
                max(line["barrier"] for line in lines),
                self.split,
                None,
                None,
                rows,
            )
        ]


def _line(one: str, two: str, loss: list[float]) -> dict[str, Any]:
    """Return a line with its barrier, for the notes."""
    ts = [k / (len(loss) - 1) for k in range(len(loss))]
    above = [value - (1 - t) * loss[0] - t * loss[-1] for t, value in zip(ts, loss, strict=True)]
    at = max(range(len(loss)), key=lambda k: above[k])
    return {"from": one, "to": two, "t": ts, "loss": loss, "barrier": above[at], "at": ts[at]}


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [InterpolationBarrier]
