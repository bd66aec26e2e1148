"""Lazy tensors read what they say they are, and only when they are asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rotdistill_core.checkpoint.lazy import LazyTensor, open_tensors, split_rows, stack_rows


def test_a_tensor_at_hand_has_its_own_shape_and_dtype() -> None:
    tensor = torch.randn(2, 3, dtype=torch.float64)
    lazy = LazyTensor.from_tensor(tensor)
    assert (lazy.shape, lazy.dtype, lazy.stored) == ((2, 3), torch.float64, None)
    assert lazy.read() is tensor


def test_tensors_of_a_file_know_where_they_lie(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(4, dtype=torch.int32)}
    save_file(tensors, tmp_path / "x.safetensors")
    opened = open_tensors(tmp_path / "x.safetensors")
    assert set(opened) == set(tensors)
    for name, tensor in tensors.items():
        lazy = opened[name]
        assert (lazy.shape, lazy.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert lazy.stored == (tmp_path / "x.safetensors", name)
        assert torch.equal(lazy.read(), tensor)


def test_a_fused_tensor_is_split_into_rows_and_stacked_again() -> None:
    whole = torch.randn(7, 2)
    shapes: dict[str, tuple[int, ...]] = {"q": (4, 2), "k": (1, 2), "v": (2, 2)}
    parts = split_rows(LazyTensor.from_tensor(whole), shapes)
    assert torch.equal(parts["k"].read(), whole[4:5])
    assert [part.shape for part in parts.values()] == list(shapes.values())
    stacked = stack_rows(list(parts.values()))
    assert (stacked.shape, stacked.dtype) == ((7, 2), torch.float32)
    assert torch.equal(stacked.read(), whole)


def test_nothing_is_read_before_it_is_asked_for() -> None:
    def fail() -> torch.Tensor:
        raise AssertionError("read too early")

    lazy = LazyTensor((4, 2), torch.float32, fail)
    parts = split_rows(lazy, {"a": (1, 2), "b": (3, 2)})
    stacked = stack_rows(list(parts.values()))
    with pytest.raises(AssertionError, match="too early"):
        stacked.read()
