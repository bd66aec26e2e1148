"""The regression of a writer: moments of its inputs and of the stream's distance to a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.linalg.exact import SumTooLarge
from rotdistill_core.linalg.moments import Moments
from rotdistill_core.linalg.precision import wide_dtype, widened

LARGEST_ENTRY = 2.0**16
"""Entries of activations and of distances to targets are rarely larger. Exact sums get so much
room; where that is too little, rows go through the layer again and the sums get more."""
RowTargets = Callable[[Tensor], Tensor]
"""Numbers of rows of a process [n], on the host -> their targets `[n, d]`, on any device."""


@dataclass(frozen=True)
class _Problem:
    """The arguments of `writer_moments`."""

    forward: LayerwiseForward
    site: str

    targets: RowTargets
    weights: Tensor
    row_sets: Sequence[Tensor]
    alpha: float


def writer_moments(
    forward: LayerwiseForward,
    site: str,
    width: int,
    targets: RowTargets,
    weights: Tensor,
    row_sets: Sequence[Tensor],
    alpha: float = 1.0,
) -> list[Moments]:
    """Return the moments of `m A` against `alpha (S - X)` over each set of rows.

    `A [n, width]` are the activations at a site of the open layer, `X [n, d]` the stream after the
    layer, `S` the target, and m the factor by which a layer multiplies what it writes (1 in most
    models). The ridge solution of these moments is the change of the writer that moves the stream
    towards the target. All rows go through the layer; the states stay where they
    are, for a second visit.

    The sums are exact. They have the same bits for any number of processes that share the texts,
    and each process gets the sums of all.

    Args:
        forward: a forward pass with an open layer.
        site: the adapter's site of the activations.
        width: size of the activations.
        targets: `S`, for the rows of this process; asked for each batch of rows once.
        weights: weight of each row of the whole [rows], on the host.
        row_sets: masks of the whole [rows], on the host; one `Moments` is returned for each.
        alpha: share of the way from X to S.

    Raises:
        RotdistillError: an activation or a state is NaN or Inf.
    """
    problem = _Problem(forward, site, targets, weights, row_sets, alpha)
    counts = [float(weights[rows].double().sum()) for rows in row_sets]
    largest = LARGEST_ENTRY
    while True:
        moments = [
            Moments.exact(
                width,
                forward.weights.width,
                bound=max(count, 1.0) * largest**2,
                where=f"layer {forward.boundary}, {site}",
            )
            for count in counts
        ]
        if _added_up(problem, moments):
            return [sums.settled() for sums in moments]
        largest *= LARGEST_ENTRY


def _added_up(problem: _Problem, moments: Sequence[Moments]) -> bool:
    """Add the rows of all processes to moments; return whether no sum is beyond its bound.

    All processes return the same: a sum is beyond its bound where the sizes of all terms are.
    """
    ranks = problem.forward.ranks
    failed = torch.zeros(1, dtype=torch.long)
    try:
        _add_own_rows(problem, moments)
    except SumTooLarge:
        failed += 1
    ranks.add_up(failed)
    if int(failed):
        return False
    try:
        for sums in moments:
            sums.combine(ranks.add_up, problem.forward.device)
    except SumTooLarge:
        return False
    return True


def _add_own_rows(problem: _Problem, moments: Sequence[Moments]) -> None:
    """Send the rows of this process through the open layer, and add them to moments."""
    forward = problem.forward
    pending: list[Tensor] = []
    weights = problem.weights[forward.rows].to(forward.device, wide_dtype(forward.dtype))
    row_sets = [rows[forward.rows] for rows in problem.row_sets]
    multiplier = forward.weights.adapter.residual_multiplier(forward.weights.config)

    def keep_inputs(_: Tensor, A: Tensor) -> None:
        # A bfloat16 product would be rounded.
        pending.append(A if multiplier == 1.0 else multiplier * widened(A))

    # A layer's output comes after the site's activations, batch by batch.
    def add_batch(rows: Tensor, X: Tensor) -> None:
        A = pending.pop()
        X = widened(X)
        E = problem.alpha * (problem.targets(rows).to(X) - X)
        w = weights[rows.to(X.device)]
        for sums, row_set in zip(moments, row_sets, strict=True):
            # Chosen on the host: a mask on the device would have to be waited for.
            chosen = row_set[rows].nonzero().flatten()
            if len(chosen):
                use = chosen.to(X.device)
                sums.add(A[use], E[use], w[use])

    forward.run({problem.site: keep_inputs, "output": add_batch}, advance=False)
