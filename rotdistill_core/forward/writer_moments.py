"""The regression of a writer: moments of its inputs and of the stream's distance to a target."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.linalg.moments import Moments


def writer_moments(
    forward: LayerwiseForward,
    site: str,
    width: int,
    targets: Tensor,
    weights: Tensor,
    row_sets: Sequence[Tensor],
    alpha: float = 1.0,
) -> list[Moments]:
    """Return the moments of `A` against `alpha (S - X)` over each set of rows.

    `A [n, width]` are the activations at a site of the open layer, `X [n, d]` the stream after the
    layer, `S` the target. The ridge solution of these moments is the change of the writer that
    moves the stream towards the target. All rows go through the layer; the states stay where they
    are, for a second visit.

    Args:
        forward: a forward pass with an open layer.
        site: the adapter's site of the activations.
        width: size of the activations.
        targets: `S [rows, d]`.
        weights: weight of each row [rows].
        row_sets: masks [rows]; one `Moments` is returned for each.
        alpha: share of the way from X to S.
    """
    moments = [Moments(width, targets.shape[1]) for _ in row_sets]
    pending: list[Tensor] = []

    def keep_inputs(_: Tensor, A: Tensor) -> None:
        pending.append(A)

    # A layer's output comes after the site's activations, batch by batch.
    def add_batch(rows: Tensor, X: Tensor) -> None:
        A = pending.pop()
        E = alpha * (targets[rows].to(X) - X)
        w = weights[rows]
        for sums, row_set in zip(moments, row_sets, strict=True):
            use = row_set[rows]
            sums.add(A[use], E[use], w[use])

    forward.run({site: keep_inputs, "output": add_batch}, advance=False)
    return moments
