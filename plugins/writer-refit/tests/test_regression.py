"""The choice of ridge strength and step."""

from __future__ import annotations

import pytest
import torch
from rotdistill_writer_refit._regression import best_ridge, best_step

from rotdistill_core.linalg.moments import Moments


def moments_of(rows: int, noise: float = 0.0, seed: int = 0) -> Moments:
    """Return moments of rows `A [rows, 8]` against `A B` plus noise, `B` all ones `[8, 2]`."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rows, 8, generator=generator)
    E = A @ torch.ones(8, 2) + noise * torch.randn(rows, 2, generator=generator)
    moments = Moments(8, 2)
    moments.add(A, E)
    return moments


def test_ridge_too_small_for_the_rows_is_not_a_candidate() -> None:
    fit, validation = moments_of(3), moments_of(9, seed=1)
    best = best_ridge(fit, validation, (1e-30, 1.0), "here")
    assert best.strength == 1.0
    assert best.delta.abs().sum() > 0
    nothing = best_ridge(fit, validation, (1e-30,), "here")
    assert (nothing.step, nothing.strength) == (0.0, 0.0)
    assert nothing.delta.abs().sum() == 0
    assert nothing.validation_error == validation.yy


def test_strength_is_the_one_of_least_validation_error() -> None:
    fit, validation = moments_of(20, noise=3.0), moments_of(500, seed=1)
    strengths = (1e-6, 0.1, 1.0, 1e6)
    best = best_ridge(fit, validation, strengths, "here")
    alone = [best_ridge(fit, validation, (strength,), "here") for strength in strengths]
    assert best.validation_error == min(one.validation_error for one in alone)
    assert best.validation_error == pytest.approx(validation.error(best.delta))
    assert best.strength in strengths[1:3]


@pytest.mark.parametrize(("length", "step"), [(4.0, 0.25), (1.0, 1.0), (0.5, 1.0), (-1.0, 0.0)])
def test_step_is_the_minimum_along_a_direction_within_0_and_1(length: float, step: float) -> None:
    moments = moments_of(50)
    direction = length * torch.ones(8, 2, dtype=torch.float64)
    slope = float((direction * moments.xy).sum())
    curvature = float(((moments.xx @ direction) * direction).sum())
    assert best_step(slope, curvature) == pytest.approx(step, abs=1e-6)


def test_step_along_nothing_is_0() -> None:
    assert best_step(0.0, 0.0) == 0.0
