"""Roots of covariances, and completed orthogonal factors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rotdistill_procrustes._whitening import (
    complete_orthogonal,
    matrix_roots,
    partial_polar,
    variance_roots,
)

from rotdistill_core.testing import random_rotation


def test_roots_of_variances_are_zero_where_there_is_only_rounding() -> None:
    values = torch.tensor([4.0, 1.0, 1e-12, 0.0, -1e-15], dtype=torch.float64)
    inverse, root = variance_roots(values, 0.0)
    assert inverse.tolist() == [0.5, 1.0, 0.0, 0.0, 0.0]
    assert root.tolist() == [2.0, 1.0, 0.0, 0.0, 0.0]
    assert variance_roots(torch.zeros(3, dtype=torch.float64), 0.0).inverse.tolist() == [0.0] * 3


def test_roots_of_a_covariance_whiten_it_and_multiply_to_it(
    planted_rows: Callable[..., torch.Tensor],
) -> None:
    X = planted_rows("plain", 50, 5, 0)
    C = X.T @ X
    inverse, root = matrix_roots(C, 0.0, "here")
    eye = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(inverse @ C @ inverse, eye, rtol=0, atol=1e-9)
    torch.testing.assert_close(root @ root, C, rtol=0, atol=1e-9)


def test_the_partial_factor_leaves_the_null_space_out() -> None:
    M = torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
    UV, S = partial_polar(M, "here")
    assert UV.diagonal().abs().tolist() == [1.0, 1.0, 0.0]
    assert S.tolist() == [2.0, 1.0, 0.0]


@settings(max_examples=60, deadline=None)
@given(
    d=st.integers(4, 12),
    wider=st.integers(0, 6),
    rank=st.integers(0, 4),
    seed=st.integers(0, 10**6),
)
def test_directions_that_a_map_leaves_open_are_completed_by_procrustes(
    planted_rows: Callable[..., torch.Tensor], d: int, wider: int, rank: int, seed: int
) -> None:
    Q = random_rotation(d + wider, seed)[:d]
    S = planted_rows("plain", 20 * d, d, seed + 1)
    inside = torch.linalg.eigh(S.T @ S)[1][:, :rank]
    A = inside @ torch.diag(torch.arange(1.0, rank + 1).double()) @ inside.T @ Q
    R, _ = complete_orthogonal(A, S.T @ S @ Q, "here")
    torch.testing.assert_close(R, Q, rtol=0, atol=1e-9)
    # With nothing to complete from, only the directions that A has are determined.
    other, _ = complete_orthogonal(A, torch.zeros_like(A), "here")
    eye = torch.eye(d, dtype=torch.float64)
    torch.testing.assert_close(inside.T @ other, inside.T @ Q, rtol=0, atol=1e-9)
    torch.testing.assert_close(other @ other.T, eye, rtol=0, atol=1e-9)
