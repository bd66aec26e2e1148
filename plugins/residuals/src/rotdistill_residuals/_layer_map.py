"""The layer map: which teacher boundary each student boundary is compared with.

Problem: `max_m Σ_l R²(l, m(l))` over non-decreasing maps `m` with both ends fixed. `R²(l, m)` is
the share of the variance of the teacher's rows at boundary `m` that a ridge regression from the
student's rows at boundary `l` explains: fitted on fit rows, measured on validation rows. Rows are
scaled to unit RMS and centred; massive activations are left out.

Solution: a dynamic programme over the table of R², as in time warping (Sakoe and Chiba, IEEE TASSP
26, 1978).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.data.splits import Side, Split
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.forward.layerwise import Progress
from rotdistill_core.forward.row_rms import massive_activation_mask, rms_normalise
from rotdistill_core.linalg.precision import CPU, float64_device
from rotdistill_core.linalg.solvers import ridge

MAX_FIT_ROWS = 2048
MAX_VALIDATION_ROWS = 512
RIDGE = 0.1
"""As a multiple of the mean diagonal of the student's second moments."""


class LayerMap(NamedTuple):
    """A fitted layer map."""

    r2: Tensor
    """R² of each pair of boundaries `[captured student boundaries, teacher boundaries]`."""
    by_original_depth: dict[int, int]
    """Boundary of the original student -> teacher boundary, for each captured boundary."""
    teacher_boundaries: tuple[int, ...]
    """The same for all boundaries of the original student."""
    mean_r2_stretch: float
    """Mean R² over captured boundaries of the map that `layer_map = "stretch"` uses."""

    @property
    def matched(self) -> list[int]:
        """The teacher boundary of each captured student boundary."""
        return list(self.by_original_depth.values())

    @property
    def mean_r2_match(self) -> float:
        """Mean R² of this map over captured boundaries."""
        return mean_r2(self.r2, self.matched)


def match_layers(
    activations: ActivationStore, progress: Progress, device: torch.device = CPU
) -> LayerMap:
    """Fit the monotone layer map that explains most of the teacher's stream.

    Regressions run on `device` where its float64 is fast.

    Raises:
        RotdistillError: a stream is not finite.
        RecipeError: a split has no rows left.
    """
    r2 = explained_variance(activations, progress, device)
    matched = best_monotone_map(r2)
    stretched = [activations.teacher_boundaries[depth] for depth in activations.depths]
    boundary_count = len(activations.teacher_boundaries)
    return LayerMap(
        r2=r2,
        by_original_depth=dict(zip(activations.depths, matched, strict=True)),
        teacher_boundaries=interpolate_map(activations.depths, matched, boundary_count),
        mean_r2_stretch=mean_r2(r2, stretched),
    )


def explained_variance(
    activations: ActivationStore, progress: Progress, device: torch.device = CPU
) -> Tensor:
    """Return R² of each pair of boundaries `[student boundaries, teacher boundaries]`, float64.

    Raises:
        RotdistillError: a stream is not finite.
        RecipeError: a split has no rows left.
    """
    # The rows that every capture keeps.
    layout = activations.sample
    own = layout.row_indices_in(activations.layouts[Side.STUDENT])
    student_count = len(activations.shards[Side.STUDENT])
    teacher_count = len(activations.shards[Side.TEACHER])
    fit, validation = _regression_rows(activations, layout)
    rows = torch.cat([fit, validation])
    place = float64_device(device)

    # The fitted values are linear in the targets, ŷ = H y. One matrix H [validation, fit] of a
    # student boundary serves all boundaries of the teacher.
    hats = []
    for b in range(student_count):
        X = rms_normalise(activations.rows(Side.STUDENT, b)[own[rows]].to(place))
        X = X - X[: len(fit)].mean(0)
        X_fit, X_validation = X[: len(fit)], X[len(fit) :]
        name = f"residuals: student boundary {b}"
        xx, xy = (X_fit.T @ X_fit).cpu(), X_fit.T.contiguous().cpu()
        W = ridge(xx, xy, RIDGE, name, device)
        hats.append((X_validation @ W.to(place)).float())

    r2 = torch.zeros(student_count, teacher_count, dtype=torch.float64)
    for m in range(teacher_count):
        Y = rms_normalise(activations.teacher_rows(layout, m)[rows].to(place)).float()
        Y = Y - Y[: len(fit)].mean(0)
        Y_fit, Y_validation = Y[: len(fit)], Y[len(fit) :]
        total = Y_validation.double().pow(2).sum().clamp_min(1e-30)
        for b, H in enumerate(hats):
            r2[b, m] = 1 - (Y_validation - H @ Y_fit).double().pow(2).sum() / total
        progress(m + 1, teacher_count, "layer map")
    return r2


def best_monotone_map(r2: Tensor) -> list[int]:
    """Return the non-decreasing map rows -> columns with the largest sum of R².

    It maps the first row to the first column and the last row to the last one. Of equal maps it is
    the one that stays furthest left.

    Args:
        r2: the table `[rows, columns]`.
    """
    # best[c]: largest sum of a path that ends in column c of the current row.
    best = torch.full_like(r2[0], -torch.inf)
    best[0] = r2[0, 0]
    came_from: list[Tensor] = []
    for row in r2[1:]:
        reached, last_equal = torch.cummax(best, 0)
        # cummax names the last of equal columns; the map takes the first.
        first_equal = torch.searchsorted(reached, reached)
        came_from.append(torch.where(reached.isinf(), last_equal, first_equal))
        best = reached + row
    # From the last column back to the first row.
    path = [r2.shape[1] - 1]
    for columns in reversed(came_from):
        path.append(int(columns[path[-1]]))
    return path[::-1]


def interpolate_map(
    depths: tuple[int, ...], matched: list[int], boundary_count: int
) -> tuple[int, ...]:
    """Return the map of all boundaries of the original student from that of the captured ones.

    Args:
        depths: captured boundaries, numbered as in the original student.
        matched: the teacher boundary of each.
        boundary_count: boundaries of the original student; those cut away get even steps.
    """
    steps = np.interp(range(boundary_count), depths, matched).round()
    return tuple(int(boundary) for boundary in steps)


def mean_r2(r2: Tensor, columns: list[int]) -> float:
    """Return the mean of one entry of each row."""
    return float(r2[range(len(columns)), columns].mean())


def _regression_rows(activations: ActivationStore, layout: PackedTexts) -> tuple[Tensor, Tensor]:
    """Return the fit rows and the validation rows of the regressions, evenly thinned."""
    own = layout.row_indices_in(activations.layouts[Side.STUDENT])
    kept = activations.paired_mask(layout)
    kept[0] = False  # the first token is an attention sink
    for b in range(len(activations.shards[Side.STUDENT])):
        kept &= ~massive_activation_mask(activations.rows(Side.STUDENT, b)[own])
    for m in range(len(activations.shards[Side.TEACHER])):
        kept &= ~massive_activation_mask(activations.teacher_rows(layout, m))
    fit = (kept & layout.split(Split.FIT)).nonzero().flatten()
    validation = (kept & layout.split(Split.VALIDATION)).nonzero().flatten()
    if not len(fit) or not len(validation):
        raise RecipeError(
            'residuals: layer_map = "match" needs fit and validation rows of the student; '
            "capture it on more texts."
        )
    return _thinned(fit, MAX_FIT_ROWS), _thinned(validation, MAX_VALIDATION_ROWS)


def _thinned(rows: Tensor, limit: int) -> Tensor:
    """Return every k-th row, with the smallest k that leaves at most `limit` rows."""
    return rows[:: -(-len(rows) // limit)]
