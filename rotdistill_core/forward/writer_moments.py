"""The regression of a writer: moments of its inputs and of the stream's distance to a target."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.linalg.moments import Moments
from rotdistill_core.linalg.precision import wide_dtype, widened


def writer_moments(
    forward: LayerwiseForward,
    site: str,
    width: int,
    targets: Tensor,
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

    Args:
        forward: a forward pass with an open layer.
        site: the adapter's site of the activations.
        width: size of the activations.
        targets: `S [rows, d]`.
        weights: weight of each row [rows].
        row_sets: masks [rows] on the host; one `Moments` is returned for each.
        alpha: share of the way from X to S.
    """
    moments = [Moments(width, targets.shape[1]) for _ in row_sets]
    pending: list[Tensor] = []
    # Where the states are on the device, targets go there too, once.
    targets = targets.to(forward.states.device)
    weights = weights.to(forward.device, wide_dtype(forward.dtype))
    multiplier = forward.weights.adapter.residual_multiplier(forward.weights.config)

    def keep_inputs(_: Tensor, A: Tensor) -> None:
        # A bfloat16 product would be rounded.
        pending.append(A if multiplier == 1.0 else multiplier * widened(A))

    # A layer's output comes after the site's activations, batch by batch.
    def add_batch(rows: Tensor, X: Tensor) -> None:
        A = pending.pop()
        X = widened(X)
        E = alpha * (targets[rows.to(targets.device)].to(X) - X)
        w = weights[rows.to(X.device)]
        for sums, row_set in zip(moments, row_sets, strict=True):
            # Chosen on the host: a mask on the device would have to be waited for.
            chosen = row_set[rows].nonzero().flatten()
            if len(chosen):
                use = chosen.to(X.device)
                sums.add(A[use], E[use], w[use])

    forward.run({site: keep_inputs, "output": add_batch}, advance=False)
    return moments
