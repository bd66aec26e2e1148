"""In which precision numbers are multiplied, added up and solved, and on which device.

A model computes in its own dtype, on a GPU often bfloat16. What is decided from its states is not:

- products of rows (normal equations), products with a head, and log-softmax: float32 at least
- sums over rows: float64
- solves, folds and certificates: float64

Second moments that are multiplied in bfloat16 are off by 1e-3 and not positive definite, and a KL
of bfloat16 logits is off by more than the differences that decide whether an edit is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

CPU = torch.device("cpu")
SUM_DTYPE = torch.float64
"""Dtype of sums over rows, and of everything that is solved."""
FAST_FLOAT64 = frozenset({(6, 0), (7, 0), (8, 0), (9, 0), (9, 4), (10, 0)})
"""Compute capabilities with float64 at half the speed of float32 or more, by their data sheets:
P100, V100, A100, H100, MI300, B200. Most other GPUs have 1/32 or less."""
WITHOUT_FLOAT64 = frozenset({"mps"})
"""Device types that have no float64 at all."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which products of rows of `dtype` are taken: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def widened(X: Tensor) -> Tensor:
    """Return a tensor in float32 at least, on its device; float32 and float64 stay as they are."""
    return X.to(wide_dtype(X.dtype))


def sum_device(device: torch.device) -> torch.device:
    """Return where sums over rows of a device are kept: there, or on the host without float64."""
    return CPU if device.type in WITHOUT_FLOAT64 else device


def float64_device(device: torch.device) -> torch.device:
    """Return where float64 work of a model on `device` is done.

    That is the device itself where its float64 is fast (see `FAST_FLOAT64`), else the CPU.
    """
    if device.type == "cpu":
        return device
    capability = getattr(torch.get_device_module(device), "get_device_capability", None)
    fast = capability is not None and capability(device) in FAST_FLOAT64
    return device if fast else CPU


@contextmanager
def full_float32_products() -> Iterator[None]:
    """Take float32 products in float32: switch TF32 off, and restore the setting afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
