"""Closed-form solves against LAPACK and planted truth."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rotdistill_core.errors import RotdistillError, SingularError
from rotdistill_core.linalg.moments import Moments
from rotdistill_core.linalg.solvers import polar, require_finite, ridge, svd

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31)
widths = st.integers(1, 6)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(seed: int, d: int, e: int) -> Tensor:
    return torch.linalg.qr(randn(seed, e, d))[0].T


def filled(X: Tensor, Y: Tensor, weights: Tensor | None = None) -> Moments:
    moments = Moments(X.shape[1], Y.shape[1])
    moments.add(X, Y, weights)
    return moments


def assert_row_orthogonal(R: Tensor) -> None:
    torch.testing.assert_close(R @ R.T, torch.eye(len(R), dtype=torch.float64), atol=1e-12, rtol=0)


def forbid_lapack(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*args: object, **options: object) -> None:
        raise AssertionError("LAPACK was called")

    for name in ("svd", "cho_factor", "cho_solve"):
        monkeypatch.setattr(scipy.linalg, name, reached)


@few
@given(seeds, widths, widths, st.floats(1e-6, 10.0))
def test_ridge_solves_the_normal_equations(seed: int, d: int, e: int, strength: float) -> None:
    moments = filled(randn(seed, 12, d), randn(seed + 1, 12, e))
    B = ridge(moments.xx, moments.xy, strength, "here")
    penalty = strength * float(moments.xx.diagonal().mean())
    torch.testing.assert_close(moments.xx @ B + penalty * B, moments.xy, rtol=1e-8, atol=1e-8)


@few
@given(seeds, widths, widths)
def test_ridge_tends_to_least_squares(seed: int, d: int, e: int) -> None:
    X, Y = randn(seed, 40, d), randn(seed + 1, 40, e)
    moments = filled(X, Y)
    expected = np.linalg.lstsq(X.numpy(), Y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(
        ridge(moments.xx, moments.xy, 1e-13, "here").numpy(), expected, atol=1e-8
    )
    np.testing.assert_allclose(
        ridge(moments.xx, moments.xy, 0.0, "here").numpy(), expected, atol=1e-8
    )


def test_ridge_leaves_its_input_alone() -> None:
    moments = filled(randn(0, 9, 3), randn(1, 9, 2))
    before = moments.xx.clone(), moments.xy.clone()
    ridge(moments.xx, moments.xy, 0.5, "here")
    assert torch.equal(moments.xx, before[0])
    assert torch.equal(moments.xy, before[1])


def test_a_singular_system_names_its_place() -> None:
    xx = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64)
    with pytest.raises(SingularError, match=r"layer 7: .* singular at ridge 0"):
        ridge(xx - torch.eye(2, dtype=torch.float64) * 1e-9, xx, 0.0, "layer 7")


@few
@given(seeds, st.integers(1, 6), st.integers(0, 3))
def test_polar_recovers_a_planted_rotation(seed: int, d: int, more: int) -> None:
    X, R = randn(seed, 40, d), orthogonal(seed + 1, d, d + more)
    found, spectrum = polar(X.T @ (X @ R), "here")
    torch.testing.assert_close(found, R, atol=1e-9, rtol=0)
    torch.testing.assert_close(spectrum.sum(), X.pow(2).sum())


def test_polar_recovers_a_reflection() -> None:
    R = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    X = randn(0, 30, 3)
    torch.testing.assert_close(polar(X.T @ X @ R, "here")[0], R)


@few
@given(seeds, st.integers(1, 6), st.integers(0, 3), st.integers(0, 6))
def test_polar_of_a_rank_deficient_matrix_is_orthogonal_and_best(
    seed: int, d: int, more: int, rank: int
) -> None:
    rank = min(rank, d)
    M = randn(seed, d, rank) @ randn(seed + 1, rank, d + more)
    R, spectrum = polar(M, "here")
    assert_row_orthogonal(R)
    assert float((R * M).sum()) == pytest.approx(float(spectrum.sum()), abs=1e-9)


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (3, 5)])
def test_polar_of_nothing_is_the_identity(shape: tuple[int, int]) -> None:
    R, _ = polar(torch.zeros(shape, dtype=torch.float64), "here")
    torch.testing.assert_close(R, torch.eye(*shape, dtype=torch.float64))


def test_polar_completes_a_null_space_towards_the_identity() -> None:
    M = torch.zeros(5, 5, dtype=torch.float64)
    M[0, 1], M[1, 0] = 3.0, 2.0
    expected = torch.eye(5, dtype=torch.float64)[[1, 0, 2, 3, 4]]
    torch.testing.assert_close(polar(M, "here")[0], expected)


SOLVES: dict[str, Callable[[Tensor], object]] = {
    "svd": lambda M: svd(M, "layer 3, heads"),
    "polar": lambda M: polar(M, "layer 3, heads"),
    "ridge xx": lambda M: ridge(M, torch.ones_like(M), 0.1, "layer 3, heads"),
    "ridge xy": lambda M: ridge(torch.eye(3, dtype=M.dtype), M, 0.1, "layer 3, heads"),
    "check": lambda M: require_finite(M, "layer 3, heads"),
}


@pytest.mark.parametrize("solve", SOLVES.values(), ids=SOLVES.keys())
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused_by_name_before_lapack(
    monkeypatch: pytest.MonkeyPatch, solve: Callable[[Tensor], object], bad: float
) -> None:
    forbid_lapack(monkeypatch)
    M = torch.eye(3, dtype=torch.float64)
    M[1, 2] = M[2, 2] = bad
    with pytest.raises(RotdistillError, match="layer 3, heads: 2 of 9 values are NaN or Inf"):
        solve(M)


def failing_svd(monkeypatch: pytest.MonkeyPatch, *drivers: str) -> list[str]:
    real, called = scipy.linalg.svd, []

    def fake(array: np.ndarray, *, lapack_driver: str, **options: bool) -> object:
        called.append(lapack_driver)
        if lapack_driver in drivers:
            raise scipy.linalg.LinAlgError("SVD did not converge")
        return real(array, lapack_driver=lapack_driver, **options)

    monkeypatch.setattr(scipy.linalg, "svd", fake)
    return called


def test_svd_falls_back_to_gesvd(monkeypatch: pytest.MonkeyPatch) -> None:
    called = failing_svd(monkeypatch, "gesdd")
    M = randn(0, 3, 5)
    U, S, Vt = svd(M, "here")
    assert called == ["gesdd", "gesvd"]
    torch.testing.assert_close(U @ torch.diag(S) @ Vt, M)


def test_svd_that_never_converges_names_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    failing_svd(monkeypatch, "gesdd", "gesvd")
    with pytest.raises(
        RotdistillError, match="layer 4: the singular value decomposition does not converge"
    ):
        svd(randn(0, 3, 3), "layer 4")


def test_svd_is_thin_and_in_float64() -> None:
    U, S, Vt = svd(randn(0, 2, 5).float(), "here")
    assert (U.shape, S.shape, Vt.shape) == ((2, 2), (2,), (2, 5))
    assert U.dtype == S.dtype == Vt.dtype == torch.float64
