"""The ridge regression of one writer, and the choice of its strength and step on other rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rotdistill_core.errors import SingularError
from rotdistill_core.forward.ranks import ALONE, Ranks
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
    ranks: Ranks = ALONE,
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
        ranks: the processes that share the candidates. All of them hold the same moments and call
            this; in those that do not lead, `delta` is not that of the best.
    """
    nothing = RidgeFit(torch.zeros_like(fit.xy), 0.0, 0.0, validation.yy)
    own = {
        k: _candidate(fit, validation, strengths[k], where, device)
        for k in ranks.mine(range(len(strengths)))
    }
    errors, steps = (torch.zeros(len(strengths), dtype=torch.float64) for _ in range(2))
    for k, found in own.items():
        helps = found is not None and found.validation_error < nothing.validation_error
        errors[k] = found.validation_error if found and helps else math.inf
        steps[k] = found.step if found else 0.0
    # All but one of the numbers that are added up are zero, so the sums are exact.
    ranks.add_up(errors)
    ranks.add_up(steps)
    best = int(errors.argmin())
    if not math.isfinite(errors[best]):
        return nothing
    solved = own.get(best)
    part = solved.delta if solved else nothing.delta[:0]
    owner = best % ranks.count
    lengths = [len(nothing.delta) if number == owner else 0 for number in range(ranks.count)]
    parts = ranks.collect(part, lengths)
    delta = parts[owner] if parts else nothing.delta
    return RidgeFit(delta, strengths[best], float(steps[best]), float(errors[best]))


def _candidate(
    fit: Moments, validation: Moments, strength: float, where: str, device: torch.device
) -> RidgeFit | None:
    """Return the solution for one λ with its best step; None if it cannot be solved."""
    try:
        delta = ridge(fit.xx, fit.xy, strength, where, device)
    except SingularError:
        # Fewer rows than unknowns, and a λ below rounding: not a candidate.
        return None
    # The error is a parabola in the step a: `yy - 2 a tr(Δᵀ xy) + a² tr(Δᵀ xx Δ)`.
    slope = float((delta * validation.xy).sum())
    curvature = float(((validation.xx @ delta) * delta).sum())
    step = best_step(slope, curvature)
    error = validation.yy - 2.0 * step * slope + step**2 * curvature
    return RidgeFit(step * delta, strength, step, error)


def best_step(slope: float, curvature: float) -> float:
    """Return the step a in [0, 1] with the least `a² curvature - 2 a slope`."""
    if not curvature > 0:
        return 0.0
    return min(1.0, max(0.0, slope / curvature))
