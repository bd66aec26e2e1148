"""The closed form of one reflection, and the stages that it is fitted on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rotdistill_householder._method import lowest_eigenpair, reflect, stages_of

from rotdistill_core.errors import RotdistillError
from rotdistill_core.linalg.maps import Maps, Rotation
from rotdistill_core.testing import random_rotation


@settings(max_examples=60, deadline=None)
@given(d=st.integers(2, 12), wider=st.integers(0, 6), seed=st.integers(0, 10**6))
def test_a_reflection_changes_the_error_by_four_times_the_eigenvalue(
    d: int, wider: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(50, d, dtype=torch.float64, generator=generator)
    T = torch.randn(50, d + wider, dtype=torch.float64, generator=generator)
    R = random_rotation(d + wider, seed)[:d]
    lowest = lowest_eigenpair(R.T @ X.T @ T)

    def error(R: torch.Tensor) -> float:
        return float((X @ R - T).pow(2).sum())

    reflected = reflect(R, lowest.v)
    change = error(reflected) - error(R)
    assert change == pytest.approx(4 * lowest.value, rel=1e-9, abs=1e-8)
    torch.testing.assert_close(reflect(R, -lowest.v), reflected, rtol=0, atol=1e-14)
    eye = torch.eye(d, dtype=torch.float64)
    torch.testing.assert_close(reflected @ reflected.T, eye, rtol=0, atol=1e-12)
    for k in range(5):
        other = random_rotation(d + wider, seed + k)[:, 0]
        assert error(reflect(R, other)) - error(R) >= change - 1e-9


def test_sums_that_are_not_finite_are_refused() -> None:
    G = torch.eye(3, dtype=torch.float64)
    G[0, 1] = float("inf")
    with pytest.raises(RotdistillError, match="householder: 1 of 9 values are NaN or Inf"):
        lowest_eigenpair(G)


def test_stages_are_runs_of_one_rotation() -> None:
    a, b = Rotation(random_rotation(4, 1)), Rotation(random_rotation(4, 2))
    maps = Maps(
        {
            "residual.0": a,
            "residual.1": Rotation(a.matrix.clone()),
            "residual.2": b,
            "residual.4": b,
            "neurons.0": a,
        }
    )
    assert [stage.boundaries for stage in stages_of(maps, 5)] == [[0, 1], [2], [4]]
