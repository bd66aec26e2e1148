"""The ridge regression of one writer, and the choice of its strength and step on other rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rotdistill_core.errors import SingularError
from rotdistill_core.linalg.moments import Moments
from rotdistill_core.linalg.precision import CPU
from rotdistill_core.linalg.solvers import ridge


class RidgeFit(NamedTuple):
    """A solution, and how it was chosen."""

    delta: Tensor
    """The solution times its step `[f, d]`; zeros where no candidate helps."""
    strength: float
    """λ as a multiple of the mean diagonal of `AᵀA`; 0 where no candidate helps."""
    step: float
    """The step in [0, 1]."""
    validation_error: float
    """`Σ w ‖e - a Δ‖²` over validation rows."""


def best_ridge(
    fit: Moments,
    validation: Moments,
    strengths: Sequence[float],
    where: str,
    device: torch.device = CPU,
) -> RidgeFit:
    """Return the ridge solution with the least error on validation rows.

    For each λ: `Δ = (Aᵀ w A + λI)⁻¹ Aᵀ w E` `[f, d]` on the fit rows, then the best step along Δ on
    the validation rows. Step 0 is a candidate, so the error never exceeds that of doing nothing.

    Args:
        fit: moments of activations `A [n, f]` and residuals `E [n, d]` over the fit rows.
        validation: the same over the validation rows.
        strengths: λ as multiples of the mean diagonal of `AᵀA`.
        where: names the writer in errors.
        device: where the rows were; see `rotdistill_core.linalg.solvers`.
    """
    best = RidgeFit(torch.zeros_like(fit.xy), 0.0, 0.0, validation.yy)
    for strength in strengths:
        try:
            delta = ridge(fit.xx, fit.xy, strength, where, device)
        except SingularError:
            # Fewer rows than unknowns, and a λ below rounding: not a candidate.
            continue
        step = best_step(validation, delta)
        error = validation.error(step * delta)
        if error < best.validation_error:
            best = RidgeFit(step * delta, strength, step, error)
    return best


def best_step(moments: Moments, delta: Tensor) -> float:
    """Return the step in [0, 1] with the least error along `delta` `[f, d]`.

    The error is a parabola in the step a: `yy - 2 a tr(Δᵀ xy) + a² tr(Δᵀ xx Δ)`.
    """
    curvature = float(((moments.xx @ delta) * delta).sum())
    if not curvature > 0:
        return 0.0
    minimum = float((delta * moments.xy).sum()) / curvature
    return min(1.0, max(0.0, minimum))
