"""TODO: rotdistill_core.checkpoint.lazy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True)
class LazyTensor:
    """One parameter: its shape and dtype, how to read it, and where it lies when it is on disk as it is."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    stored: tuple[Path, str] | None = None


def open_tensors(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of one safetensors file, memory-mapped: a read touches that tensor's pages only."""
    from rotdistill_core.checkpoint.headers import read_header

    handle: Any = safe_open(path, "pt")
    return {
        name: LazyTensor(
            h.shape,
            getattr(torch, h.dtype),
            lambda name=name: handle.get_tensor(name),
            (path, name),
        )  # type: ignore[misc]
        for name, h in read_header(path).items()
    }
