"""Thresholds of massive activations: a multiple of the median row, from integers that add up."""

from __future__ import annotations

import math

import pytest
import torch

from rotdistill_core.forward.row_rms import (
    MASSIVE,
    massive_activation_mask,
    massive_threshold,
    rms_histogram,
)


def rows(seed: int, count: int = 101) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 16, generator=g) * torch.rand(count, 1, generator=g)


def test_histograms_of_parts_add_up_to_that_of_all() -> None:
    X = rows(0)
    parts = sum(rms_histogram(part) for part in X.split(13))
    assert torch.equal(torch.as_tensor(parts), rms_histogram(X))


@pytest.mark.parametrize("count", [1, 2, 100, 101])
def test_the_threshold_is_a_multiple_of_the_median(count: int) -> None:
    X = rows(count, count)
    exact = MASSIVE * float(X.double().pow(2).mean(-1).sqrt().median())
    # A bin is 2 % wide, and its upper edge is taken.
    assert exact <= massive_threshold(rms_histogram(X)) <= 1.03 * exact


def test_rows_above_the_threshold_are_massive() -> None:
    X = torch.ones(50, 4)
    X[7] *= 8.5
    X[8] *= 7.9
    assert massive_activation_mask(X).nonzero().flatten().tolist() == [7]
    assert massive_activation_mask(X, 7.5).nonzero().flatten().tolist() == [7, 8]


def test_a_rounding_of_the_rows_moves_no_threshold() -> None:
    X = rows(3).double()
    nudged = X * (1 + 1e-9)
    assert massive_threshold(rms_histogram(X)) == massive_threshold(rms_histogram(nudged))


def test_rows_without_a_length() -> None:
    X = torch.zeros(5, 4)
    assert not massive_activation_mask(X).any()
    X[0] = 1.0
    assert massive_activation_mask(X).tolist() == [True, False, False, False, False]
    X[1] = torch.nan
    assert massive_threshold(rms_histogram(X)) < 1e-15
    assert massive_threshold(rms_histogram(X[:0])) == math.inf
