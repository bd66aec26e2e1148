"""A cast on the way to a file is looked at: what does not fit is refused with value and remedy."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rotdistill_core.errors import CheckFailed
from rotdistill_core.store.casts import SAVE_DTYPE, cast_that_fits, is_finite
from rotdistill_core.store.files import TensorSource, tensor_blocks, write_file

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_fits_is_cast(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    X = torch.tensor([-largest, 0.0, 1e-9, largest], dtype=torch.float64)
    assert torch.equal(cast_that_fits(X, dtype, "x"), X.to(dtype))


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (7e4, torch.float16, "x: 1 of its 3 numbers do not fit float16: the largest is 70,000, "),
        (-7e4, torch.float16, 'float16 ends at 65,504, .* student.save_dtype = "bfloat16" or'),
        (65520.0, torch.float16, "do not fit float16"),  # half way to the next power rounds up
        (
            3.4e38,
            torch.bfloat16,
            'do not fit bfloat16.* student.save_dtype = "float32" or "float64"',
        ),
        (1e300, torch.float32, 'do not fit float32.* = "float64"'),
        (math.nan, torch.float16, "x: 1 of its 3 numbers are NaN or Inf before they are written"),
        (-math.inf, torch.float32, "are NaN or Inf before they are written"),
        (math.inf, torch.float64, "are NaN or Inf before they are written"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_value_and_remedy(
    value: float, dtype: torch.dtype, message: str
) -> None:
    X = torch.tensor([1.0, value, 2.0], dtype=torch.float64)
    with pytest.raises(CheckFailed, match=message):
        cast_that_fits(X, dtype, "x", SAVE_DTYPE)


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_spoilt_number_among_many_is_found(dtype: torch.dtype) -> None:
    for spoilt in (math.nan, math.inf, -math.inf):
        X = torch.zeros(40, 30, dtype=dtype)
        assert is_finite(X)
        X[39, 29] = spoilt
        assert not is_finite(X)


def test_whole_numbers_and_empty_tensors_are_finite() -> None:
    assert is_finite(torch.tensor([1, 2]))
    assert is_finite(torch.tensor([True]))
    assert is_finite(torch.empty(0, 4))


def test_a_refused_file_does_not_appear(tmp_path: Path) -> None:
    sources = {
        "fine": TensorSource.of(torch.ones(2, dtype=torch.float16)),
        "broken": TensorSource((2,), torch.float16, lambda: torch.full((2,), 1e5)),
    }
    with pytest.raises(CheckFailed, match=r"broken: 2 of its 2 numbers do not fit float16"):
        write_file(tmp_path / "a.safetensors", tensor_blocks(sources))
    assert list(tmp_path.iterdir()) == []
