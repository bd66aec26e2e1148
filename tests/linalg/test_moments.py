"""Second moments against explicit sums."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rotdistill_core.errors import RotdistillError
from rotdistill_core.linalg.moments import Moments
from rotdistill_core.linalg.solvers import ridge

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_of_narrow_rows_are_those_of_float64(dtype: torch.dtype) -> None:
    # Rows with a common part, as residual streams have: products taken in bfloat16 are off by 1e-3
    # here, and not positive definite.
    X = (randn(0, 1, 64) + 0.05 * randn(1, 2000, 64)).to(dtype)
    Y = randn(2, 2000, 8).to(dtype)
    moments = filled(X, Y)
    assert moments.xx.dtype == moments.xy.dtype == torch.float64
    exact_xx = X.double().T @ X.double()
    exact_xy = X.double().T @ Y.double()
    assert float((moments.xx - exact_xx).norm() / exact_xx.norm()) < 1e-6
    assert float((moments.xy - exact_xy).norm() / exact_xx.norm()) < 1e-6
    assert moments.yy == pytest.approx(float(Y.double().pow(2).sum()), rel=1e-6)
    assert float(torch.linalg.eigvalsh(moments.xx)[0]) > 0
    B = ridge(moments.xx, moments.xy, 0.003, "here")
    exact = ridge(exact_xx, exact_xy, 0.003, "here")
    assert float((B - exact).norm() / exact.norm()) < 1e-3


def combine(one: Moments, other: Moments) -> None:
    """Add the rows of other moments as if another process had them."""
    sent: list[Tensor] = []
    other.combine(lambda tensor: sent.append(tensor.clone()), torch.device("cpu"))
    one.combine(lambda tensor: tensor.add_(sent.pop(0)), torch.device("cpu"))
    assert not sent


def exact_moments(X: Tensor, Y: Tensor, w: Tensor, bound: float = 1e4) -> Moments:
    moments = Moments.exact(X.shape[1], Y.shape[1], bound)
    moments.add(X, Y, w)
    return moments


@few
@given(seeds, widths, widths, st.permutations(range(6)), st.integers(1, 5))
def test_exact_moments_have_the_same_bits_in_any_order_and_grouping(
    seed: int, d: int, e: int, order: list[int], cut: int
) -> None:
    X, Y = randn(seed, 6, 5, d), randn(seed + 1, 6, 5, e)
    w = randn(seed + 2, 6, 5).abs()
    in_order = Moments.exact(d, e, 1e4)
    for k in range(6):
        in_order.add(X[k], Y[k], w[k])
    first, second = Moments.exact(d, e, 1e4), Moments.exact(d, e, 1e4)
    for k in order[:cut]:
        first.add(X[k], Y[k], w[k])
    for k in order[cut:]:
        second.add(X[k], Y[k], w[k])
    combine(second, first)
    assert torch.equal(second.xx, in_order.xx)
    assert torch.equal(second.xy, in_order.xy)
    assert (second.yy, second.weight) == (in_order.yy, in_order.weight)


@few
@given(seeds, widths, widths)
def test_exact_moments_agree_with_others(seed: int, d: int, e: int) -> None:
    X, Y, w = randn(seed, 9, d), randn(seed + 1, 9, e), randn(seed + 2, 9).abs()
    exact, plain = exact_moments(X, Y, w), filled(X, Y, w)
    for one, two in ((exact.xx, plain.xx), (exact.xy, plain.xy)):
        assert float((one - two).norm()) <= 1e-15 * float(two.norm())
    assert exact.yy == pytest.approx(plain.yy, rel=1e-15)
    assert exact.weight == pytest.approx(plain.weight, rel=1e-15)


def test_only_exact_moments_are_added_up_over_processes() -> None:
    moments = filled(randn(0, 4, 3), randn(1, 4, 2))
    with pytest.raises(ValueError, match="Only exact moments"):
        combine(moments, moments)


def test_exact_moments_beyond_their_bound_are_refused() -> None:
    X, Y, w = randn(0, 40, 3), randn(1, 40, 2), torch.ones(40, dtype=torch.float64)
    with pytest.raises(RotdistillError, match=r"moments, xx: the terms are larger than the bound"):
        exact_moments(X, Y, w, bound=1.0)
