"""Second moments against explicit sums."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rotdistill_core.linalg.moments import Moments

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31)
widths = st.integers(1, 6)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(X: Tensor, Y: Tensor, weights: Tensor | None = None) -> Moments:
    moments = Moments(X.shape[1], Y.shape[1])
    moments.add(X, Y, weights)
    return moments


def assert_same(one: Moments, two: Moments) -> None:
    torch.testing.assert_close(one.xx, two.xx)
    torch.testing.assert_close(one.xy, two.xy)
    assert (one.yy, one.weight) == pytest.approx((two.yy, two.weight))


@few
@given(seeds, widths, widths)
def test_moments_are_the_sums_of_the_weighted_rows(seed: int, d: int, e: int) -> None:
    X, Y, w = randn(seed, 9, d), randn(seed + 1, 9, e), randn(seed + 2, 9).abs()
    moments = filled(X, Y, w)
    torch.testing.assert_close(moments.xx, X.T @ torch.diag(w) @ X)
    torch.testing.assert_close(moments.xy, X.T @ torch.diag(w) @ Y)
    assert moments.yy == pytest.approx(float((w[:, None] * Y**2).sum()))
    assert moments.weight == pytest.approx(float(w.sum()))


@few
@given(seeds, widths, widths, st.integers(0, 10), st.booleans())
def test_batches_add_up_to_all_rows_at_once(
    seed: int, d: int, e: int, cut: int, weighted: bool
) -> None:
    X, Y = randn(seed, 10, d), randn(seed + 1, 10, e)
    w = randn(seed + 2, 10).abs() if weighted else torch.ones(10, dtype=torch.float64)
    batches = Moments(d, e)
    for part in (slice(None, cut), slice(cut, None)):
        batches.add(X[part], Y[part], w[part])
    assert_same(batches, filled(X, Y, w if weighted else None))


@few
@given(seeds, widths, widths)
def test_the_error_is_the_direct_sum(seed: int, d: int, e: int) -> None:
    X, Y = randn(seed, 8, d), randn(seed + 1, 8, e)
    w, B = randn(seed + 2, 8).abs(), randn(seed + 3, d, e)
    direct = float((w[:, None] * (Y - X @ B) ** 2).sum())
    assert filled(X, Y, w).error(B) == pytest.approx(direct)
    assert filled(X, Y).error(B) == pytest.approx(float((Y - X @ B).pow(2).sum()))


def test_the_error_of_an_exact_fit_is_zero() -> None:
    X, B = randn(0, 20, 4), randn(1, 4, 3)
    assert filled(X, X @ B).error(B) == pytest.approx(0.0, abs=1e-10)


def test_sums_of_low_precision_rows_are_kept_in_float64() -> None:
    X = randn(0, 50, 3).bfloat16()
    moments = filled(X, X.float())
    assert moments.xx.dtype == moments.xy.dtype == torch.float64
    torch.testing.assert_close(moments.xx, X.double().T @ X.double(), rtol=2e-2, atol=0.5)
