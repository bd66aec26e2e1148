"""Which layer boundary of one model is beside which of another: by relative depth, or by what one stream tells of the other.

Problem: `max_m Σ_l R²(l, m(l))` over non-decreasing maps with both ends fixed, where R²(l, m) is the share of the teacher's variance at
boundary m that a ridge regression from the student's rows at l, fitted on fit rows, explains on validation rows (rows at unit RMS,
centred, sinks left out). Solved by a dynamic programme over the table (as time warping: Sakoe and Chiba, IEEE TASSP 26, 1978).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.forward.layerwise import Progress


FIT, VALIDATION = 2048, 512
"""Most rows of each split."""
RIDGE = 0.1
"""As a multiple of the mean diagonal of the student's second moments."""


def explained(activations: ActivationStore, progress: Progress) -> Tensor:
    """Return R² of every pair of boundaries `[student boundaries, teacher boundaries]`; rows of the student's layout.

    Raises:
        RotdistillError: a stream is not finite.
        RecipeError: a split has no rows left.
    """
    import torch

    from rotdistill_core.errors import RecipeError
    from rotdistill_core.forward.activations import massive_activation_mask, rms_normalise
    from rotdistill_core.linalg.solvers import ridge

    layout = activations.layouts["student"]
    mine, theirs = (len(activations.shards[side]) for side in ("student", "teacher"))
    kept = activations.paired(layout)
    kept[0] = False
    for b in range(mine):
        kept &= ~massive_activation_mask(activations.rows("student", b))
    for b in range(theirs):
        kept &= ~massive_activation_mask(activations.teacher_rows(layout, b))
    splits = [(kept & layout.split(split)).nonzero().flatten() for split in ("fit", "validation")]
    if not all(len(rows) for rows in splits):
        raise RecipeError(
            'residuals: layer_map = "match" needs fit and validation rows of the student; capture it on more texts.'
        )
    fit, validation = (
        rows[:: -(-len(rows) // most)] for rows, most in zip(splits, (FIT, VALIDATION), strict=True)
    )
    hats = []  # ŷ = hat @ y: one matrix per student boundary serves all boundaries of the teacher
    for b in range(mine):
        X = rms_normalise(activations.rows("student", b)[torch.cat([fit, validation])])
        X = X - X[: len(fit)].mean(0)
        one, other = X[: len(fit)], X[len(fit) :]
        hats.append(
            (
                other
                @ ridge(one.T @ one, one.T.contiguous(), RIDGE, f"residuals: student boundary {b}")
            ).float()
        )
    table = torch.zeros(mine, theirs, dtype=torch.float64)
    for m in range(theirs):
        Y = rms_normalise(activations.teacher_rows(layout, m)[torch.cat([fit, validation])]).float()
        Y = Y - Y[: len(fit)].mean(0)
        one, other = Y[: len(fit)], Y[len(fit) :]
        total = other.double().pow(2).sum().clamp_min(1e-30)
        for b, hat in enumerate(hats):
            table[b, m] = 1 - (other - hat @ one).double().pow(2).sum() / total
        progress(m + 1, theirs, "layer map")
    return table


def monotone(table: Tensor) -> list[int]:
    """Return the non-decreasing map rows -> columns of the largest sum, from the first column to the last; ties to the left."""
    import torch

    best, came_from = torch.full_like(table[0], -torch.inf), []
    best[0] = table[0, 0]
    for row in table[1:]:
        reached, came = torch.cummax(best, 0)
        first = torch.searchsorted(
            reached, reached
        )  # cummax names the last of equal columns, we take the first
        came_from.append(torch.where(reached.isinf(), came, first))
        best = reached + row
    path = [table.shape[1] - 1]
    for came in reversed(came_from):
        path.append(int(came[path[-1]]))
    return path[::-1]


def spread(depths: tuple[int, ...], found: list[int], boundaries: int) -> tuple[int, ...]:
    """Return the map of all `boundaries` of the original student from that of the captured ones, even steps in between."""
    import numpy

    return tuple(int(m) for m in numpy.interp(range(boundaries), depths, found).round())
