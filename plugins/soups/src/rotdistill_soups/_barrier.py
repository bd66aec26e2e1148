"""The interpolation barrier between checkpoints: whether they can be averaged at all.

`L(t)` is the loss of `(1 - t) A + t B`, and the barrier is `max_t L(t) - (1 - t) L(0) - t L(1)`. It
is never below 0, and 0 where the line nowhere lies above the chord between its ends. (Frankle et
al., Linear Mode Connectivity and the Lottery Ticket Hypothesis, arXiv:1912.05671.)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.evaluation.kl_scorer import KLScorer
from rotdistill_core.evaluation.rows import MetricRow, Variant
from rotdistill_core.forward.layerwise import Progress
from rotdistill_core.store.output import StepOutput
from rotdistill_core.store.results import CURVE_OF_VARIANT, Curve
from rotdistill_soups._cost import SCORED_ROWS
from rotdistill_soups._ingredient_set import bring_together
from rotdistill_soups._ingredients import open_ingredients
from rotdistill_soups._merge import STUDENT, MergeOptions, merge
from rotdistill_soups._mixture import Ingredient

if TYPE_CHECKING:
    from rotdistill_soups.barrier import InterpolationBarrier


class Barrier(NamedTuple):
    """The highest point of a line above the chord between its ends."""

    height: float
    """Nats per token."""
    position: float
    """Where on the line it is, from 0 to 1."""


def measure_barriers(
    step: InterpolationBarrier,
    variant: Variant,
    pair: Pair,
    samples: Samples,
    out: StepOutput,
    progress: Progress,
) -> list[MetricRow]:
    """Return the barrier of the worst line; the report gets the lines, the notes all barriers."""
    references = [STUDENT if end == CURVE_OF_VARIANT else end for end in step.between]
    opened = open_ingredients(references, variant.weights, pair, out)
    together = bring_together(opened, "ignore", None, out, progress)
    ends = dict(zip(step.between, together.ingredients, strict=True))
    scorer = KLScorer(pair, samples, step.split, out, progress, limit=SCORED_ROWS)

    losses_at_ends = {name: scorer(end.view).mean for name, end in ends.items()}
    positions = tuple(k / (step.points - 1) for k in range(step.points))
    between = positions[1:-1]
    lines = list(combinations(ends, 2))
    curves: list[Curve] = []
    for number, (one, two) in enumerate(lines):
        losses = [losses_at_ends[one]]
        for k, t in enumerate(between, 1):
            losses.append(scorer(point_on_line(together.base, ends[one], ends[two], t)).mean)
            done = number * (step.points - 1) + k
            total = len(lines) * (step.points - 1)
            progress(done, total, f"{one} to {two}: KL {losses[-1]:.4f}")
        losses.append(losses_at_ends[two])
        curves.append(Curve(one, two, positions, tuple(losses)))

    barriers = [barrier_of(curve.positions, curve.losses) for curve in curves]
    out.report.curves = curves
    out.notes["barriers"] = {
        f"{curve.start} to {curve.end}": {"barrier": barrier.height, "at": barrier.position}
        for curve, barrier in zip(curves, barriers, strict=True)
    }
    return [
        MetricRow(
            variant=variant.name,
            metric="barrier",
            value=max(barrier.height for barrier in barriers),
            split=step.split,
            n=int(scorer.rows.numel()),
        )
    ]


def point_on_line(base: Weights, one: Ingredient, two: Ingredient, t: float) -> Weights:
    """Return `(1 - t) one + t two`."""
    return merge(base, [one, two], MergeOptions(weights=lambda _: (1 - t, t)))


def barrier_of(positions: Sequence[float], losses: Sequence[float]) -> Barrier:
    """Return how far the losses of a line rise above its chord."""
    heights = [
        loss - (1 - t) * losses[0] - t * losses[-1]
        for t, loss in zip(positions, losses, strict=True)
    ]
    highest = max(range(len(heights)), key=lambda k: heights[k])
    return Barrier(heights[highest], positions[highest])
