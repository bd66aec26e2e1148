"""Sums that have the same bits in any order and any grouping of their terms."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from operator import mul
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rotdistill_core.errors import RotdistillError
from rotdistill_core.linalg import exact
from rotdistill_core.linalg.exact import ExactSum, FloatSum

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)
BOUND = 1e6
terms_of_a_row = st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=40)


def random_terms(seed: int, count: int = 24) -> list[Tensor]:
    """Matrices whose entries spread over ten decades."""
    g = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.randint(-6, 5, (count,), generator=g)
    return [torch.randn(3, 4, generator=g, dtype=torch.float64) * float(size) for size in sizes]


def sum_of(terms: list[Tensor], bound: float = BOUND) -> ExactSum:
    total = ExactSum(terms[0].shape, bound)
    for term in terms:
        total.add(term)
    return total


def same_bits(one: Tensor, two: Tensor) -> bool:
    return bool((one.view(torch.int64) == two.view(torch.int64)).all())


def nearest(values: list[float]) -> float:
    """The sum of all, rounded once."""
    return float(sum(map(Fraction, values), Fraction(0)))


@few
@given(seeds, st.randoms(use_true_random=False), st.lists(st.integers(1, 23), max_size=5))
def test_any_order_and_any_grouping_give_the_same_bits(
    seed: int, random: Any, cuts: list[int]
) -> None:
    terms = random_terms(seed)
    expected = sum_of(terms)
    random.shuffle(terms)
    ends = [0, *sorted({*cuts}), len(terms)]
    groups = [sum_of(terms[a:b]) for a, b in pairwise(ends)]
    random.shuffle(groups)
    joined = ExactSum((3, 4), BOUND)
    for group in groups:
        joined.merge(group)
    assert same_bits(joined.value(), expected.value())
    assert torch.equal(joined.state().limbs, expected.state().limbs)
    assert joined.state().size == expected.state().size


def test_a_sum_in_float64_does_not_have_them() -> None:
    # What the test above would not see if its terms were too tame.
    terms = random_terms(0)
    forward, backward = FloatSum((3, 4)), FloatSum((3, 4))
    for term in terms:
        forward.add(term)
    for term in reversed(terms):
        backward.add(term)
    assert not same_bits(forward.value(), backward.value())


@few
@given(terms_of_a_row)
def test_the_value_is_that_of_fractions(values: list[float]) -> None:
    total = sum_of([torch.tensor([v], dtype=torch.float64) for v in values])
    # Terms below 2^-48 of the bound lose digits below 2^-100 of it.
    lost = len(values) * BOUND * 2.0**-100
    assert float(total.value()) == pytest.approx(nearest(values), rel=2.3e-16, abs=lost)


def test_cancellation_loses_nothing() -> None:
    terms = [torch.tensor([v], dtype=torch.float64) for v in (1e5, 1e-5, -1e5)]
    assert float(sum_of(terms).value()) == 1e-5
    float_sum = FloatSum((1,))
    for term in terms:
        float_sum.add(term)
    assert float(float_sum.value()) != 1e-5


@few
@given(seeds)
def test_it_agrees_with_float64(seed: int) -> None:
    terms = [term.abs() for term in random_terms(seed)]
    plain = torch.stack(terms).sum(0)
    relative = (sum_of(terms).value() - plain).abs() / plain
    assert float(relative.max()) < 1e-15


@few
@given(seeds)
def test_products_of_blocks_of_rows_add_up_to_that_of_all_rows(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(640, 8, generator=g, dtype=torch.float64)
    X = X / X.pow(2).mean(-1, keepdim=True).sqrt()
    total = sum_of([rows.T @ rows for rows in X.split(64)], bound=640 * 8)
    # One product of all rows would be off by more than the sum of the blocks: 640 roundings.
    columns = X.T.tolist()
    truth = [[math.fsum(map(mul, a, b)) for b in columns] for a in columns]
    exact_xx = torch.tensor(truth, dtype=torch.float64)
    assert float((total.value() - exact_xx).norm() / exact_xx.norm()) < 1e-15


def test_lower_limbs_are_carried() -> None:
    # Each term leaves almost half a unit in the lower limb.
    unit = 2.0 ** -ExactSum((1,), BOUND).state().scale
    term = torch.tensor([0.498 * unit], dtype=torch.float64)
    total = sum_of([term] * 1000)
    assert float(total.value()) == pytest.approx(498 * unit, rel=1e-12)
    assert float(sum_of([-term] * 1000).value()) == pytest.approx(-498 * unit, rel=1e-12)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_bound_itself_fits(sign: float) -> None:
    half = torch.full((2,), sign * BOUND / 2, dtype=torch.float64)
    assert sum_of([half, half]).value().tolist() == [sign * BOUND] * 2


@pytest.mark.parametrize("values", [[5e6], [1e6] * 5, [-1e6, 1e6] * 3])
def test_what_could_overflow_is_refused(values: list[float]) -> None:
    total = ExactSum((1,), BOUND, "boundary 3")
    with pytest.raises(RotdistillError, match=r"boundary 3: the terms are larger than the bound"):
        for value in values:
            before = total.state()
            total.add(torch.tensor([value], dtype=torch.float64))
    # The refused term has left no trace.
    assert torch.equal(total.state().limbs, before.limbs)
    assert (total.state().terms, total.state().size) == (before.terms, before.size)


def test_a_term_beyond_float64_after_scaling_is_refused() -> None:
    with pytest.raises(RotdistillError, match="larger than the bound"):
        ExactSum((1,), 1e-200).add(torch.tensor([1e300], dtype=torch.float64))


def test_sums_that_overflow_together_are_refused() -> None:
    one, two = (sum_of([torch.full((1,), 3e5, dtype=torch.float64)] * 4) for _ in range(2))
    before = one.state()
    with pytest.raises(RotdistillError, match="larger than the bound"):
        one.merge(two)
    assert torch.equal(one.state().limbs, before.limbs)


def test_too_many_terms_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "MAX_TERMS", 3)
    term = torch.ones(1, dtype=torch.float64)
    total = sum_of([term] * 3)
    with pytest.raises(RotdistillError, match="takes 3 terms at most"):
        total.add(term)
    with pytest.raises(RotdistillError, match="takes 3 terms at most"):
        total.merge(sum_of([term]))


def test_the_most_terms_of_any_size_stay_in_their_limbs() -> None:
    # The proof in numbers: rounding adds at most one unit to each term, and half a unit of the
    # lower limb is 2^39.
    assert exact.MAX_TERMS << (exact.LOW_BITS - 1) < 1 << 62
    assert (1 << exact.HIGH_BITS) + exact.MAX_TERMS < 1 << 63
    # The bound itself and two units of rounding for each term are let in.
    assert (1 << (exact.HIGH_BITS - 1)) + 2 * exact.MAX_TERMS < 1 << exact.HIGH_BITS


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    total = ExactSum((2,), BOUND, "boundary 3")
    with pytest.raises(RotdistillError, match="boundary 3: 1 of 2 values are NaN or Inf"):
        total.add(torch.tensor([1.0, bad], dtype=torch.float64))


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf, 1e300])
def test_a_bound_without_a_unit_is_refused(bound: float) -> None:
    with pytest.raises(ValueError, match="no sum can have the bound"):
        ExactSum((1,), bound)


def test_other_shapes_and_bounds_are_refused() -> None:
    total = ExactSum((2,), BOUND)
    with pytest.raises(ValueError, match="a term of shape"):
        total.add(torch.ones(1, dtype=torch.float64))  # must not be broadcast
    for other in (ExactSum((1,), BOUND), ExactSum((2,), 8 * BOUND)):
        with pytest.raises(ValueError, match="not one sum"):
            total.merge(other)


def test_a_restored_sum_goes_on() -> None:
    terms = random_terms(7)
    begun = sum_of(terms[:10])
    restored = ExactSum.restore(begun.state())
    for term in terms[10:]:
        restored.add(term)
    assert same_bits(restored.value(), sum_of(terms).value())
    assert same_bits(begun.value(), sum_of(terms[:10]).value())


def test_an_empty_sum_is_zero() -> None:
    assert ExactSum((2, 3), BOUND).value().tolist() == [[0.0] * 3] * 2
    assert ExactSum((0, 3), BOUND).value().shape == (0, 3)
