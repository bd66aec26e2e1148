"""Where float64 work runs, and that float32 products are float32."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rotdistill_core.linalg import precision
from rotdistill_core.linalg.precision import (
    float64_device,
    full_float32_products,
    sum_device,
    wide_dtype,
    widened,
)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_products_are_taken_in_float32_at_least(dtype: torch.dtype, wide: torch.dtype) -> None:
    assert wide_dtype(dtype) == wide
    assert widened(torch.ones(2, dtype=dtype)).dtype == wide


def test_tf32_is_off_inside_and_restored_after() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with full_float32_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("kind", "capability", "place"),
    [
        ("cpu", None, "cpu"),
        ("mps", None, "cpu"),
        ("cuda:1", (9, 0), "cuda:1"),  # H100
        ("cuda:0", (8, 0), "cuda:0"),  # A100
        ("cuda:0", (8, 9), "cpu"),  # RTX 4090
        ("cuda:0", (12, 0), "cpu"),  # RTX 5090
    ],
)
def test_float64_runs_where_it_is_fast(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    capability: tuple[int, int] | None,
    place: str,
) -> None:
    module = SimpleNamespace()
    if capability:
        module.get_device_capability = lambda _: capability
    monkeypatch.setattr(precision.torch, "get_device_module", lambda _: module)
    assert float64_device(torch.device(kind)) == torch.device(place)


def test_sums_stay_on_the_device_unless_it_has_no_float64() -> None:
    assert sum_device(torch.device("cuda:1")) == torch.device("cuda:1")
    assert sum_device(torch.device("mps")) == torch.device("cpu")
