"""Sums over paired rows: what they are, and that neither order nor grouping shows in them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotdistill_core.errors import RotdistillError
from rotdistill_core.linalg.paired_sums import PairedSums, RowSums

BOUND = 4096.0
NAMES = ("C_st", "C_st_shuffled", "C_ss", "C_tt", "student_sum", "teacher_sum", "student_energy")


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def blocks_of(seed: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    S, T = randn(seed, 40, 3), randn(seed + 1, 40, 5)
    return list(zip(S.split(7), T.split(7), T.roll(20, 0).split(7), strict=True))


def begun(**kinds: Any) -> PairedSums:
    return PairedSums(3, 5, BOUND, **{"shuffled": True, "squares": True, **kinds})


def added(blocks: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> PairedSums:
    sums = begun()
    for block in blocks:
        sums.add(*block)
    return sums


def same_bits(one: RowSums, two: RowSums) -> bool:
    return one.rows == two.rows and all(
        torch.equal(getattr(one, name), getattr(two, name)) for name in NAMES
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 6))
def test_neither_order_nor_grouping_shows(seed: int, cut: int) -> None:
    blocks = blocks_of(seed)
    expected = added(blocks).value()
    random.Random(seed).shuffle(blocks)
    joined = added(blocks[:cut])
    joined.merge(added(blocks[cut:]))
    assert same_bits(joined.value(), expected)


def test_they_are_the_products_of_all_rows() -> None:
    S, T = randn(0, 40, 3), randn(1, 40, 5)
    sums = added(blocks_of(0)).value()
    assert sums.rows == 40
    expected = {
        "C_st": S.T @ T,
        "C_st_shuffled": S.T @ T.roll(20, 0),
        "C_ss": S.T @ S,
        "C_tt": T.T @ T,
        "student_sum": S.sum(0),
        "teacher_sum": T.sum(0),
        "student_energy": S.pow(2).sum(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(sums, name), value, rtol=1e-13, atol=1e-13)


def test_sums_that_nobody_asked_for_are_zero() -> None:
    sums = begun(shuffled=False, squares=False)
    sums.add(*blocks_of(0)[0])
    assert sums.names == ["C_st", "student_sum", "teacher_sum", "student_energy"]
    value = sums.value()
    assert (value.C_ss.shape, value.C_tt.shape) == ((3, 3), (5, 5))
    assert not any(bool(each.any()) for each in (value.C_ss, value.C_tt, value.C_st_shuffled))


def test_stored_sums_go_on() -> None:
    blocks = blocks_of(3)
    resumed = begun()
    resumed.load(added(blocks[:2]).state())
    for block in blocks[2:]:
        resumed.add(*block)
    assert same_bits(resumed.value(), added(blocks).value())


def test_what_is_stored_must_have_this_shape_and_bound() -> None:
    state = added(blocks_of(0)).state()
    for other in (PairedSums(3, 5, 4 * BOUND), PairedSums(5, 3, BOUND)):
        with pytest.raises(ValueError, match="another shape or bound"):
            other.load(state)
    with pytest.raises(ValueError, match="different kinds"):
        begun().merge(begun(squares=False))


def test_rows_that_are_as_many_times_as_long() -> None:
    S, T = randn(0, 9, 3), randn(1, 9, 5)
    plain, longer = begun(), begun()
    plain.add(S, T, T)
    longer.add(4 * S, T / 2, T / 2)
    assert same_bits(plain.value().scaled(4.0, 0.5), longer.value())


def test_a_row_that_is_not_finite_names_the_place() -> None:
    S, T, T_other = blocks_of(0)[0]
    S[1, 2] = torch.nan
    sums = PairedSums(3, 5, BOUND, where="boundary 7")
    with pytest.raises(RotdistillError, match=r"boundary 7, C_st: 5 of 15 values are NaN"):
        sums.add(S, T, T_other)
