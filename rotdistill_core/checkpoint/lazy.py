"""Tensors that are not in memory: read from a file, or computed, when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from rotdistill_core.checkpoint.headers import read_header


class StoredTensor(NamedTuple):
    """Where the bytes of a tensor lie."""

    file: Path
    """A safetensors file."""
    name: str
    """The tensor's name in that file."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is not in memory: its shape, its dtype, and how to read it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    stored: StoredTensor | None = None
    """Where its bytes lie; None where `read` computes them, or holds the tensor."""

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> LazyTensor:
        """Return a tensor at hand as a lazy one."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def open_tensors(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of a safetensors file, memory-mapped.

    Reading one touches no pages but its own. The header is compared with the file's size first.

    Raises:
        SetupError: see `read_header`.
    """
    headers = read_header(path)
    handle: Any = safe_open(path, "pt")
    return {
        name: LazyTensor(
            shape=header.shape,
            dtype=getattr(torch, header.dtype),
            read=partial(handle.get_tensor, name),
            stored=StoredTensor(path, name),
        )
        for name, header in headers.items()
    }


def split_rows(whole: LazyTensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
    """Return the tensors of these shapes that a fused tensor holds, one below the other."""
    ends = accumulate(shape[0] for shape in shapes.values())
    return {
        name: LazyTensor(shape, whole.dtype, partial(_read_rows, whole, end - shape[0], end))
        for (name, shape), end in zip(shapes.items(), ends, strict=True)
    }


def stack_rows(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Return the fused tensor that holds the parts, one below the other; undoes `split_rows`."""
    first = parts[0]
    rows = sum(part.shape[0] for part in parts)
    return LazyTensor((rows, *first.shape[1:]), first.dtype, partial(_read_stacked, parts))


def _read_rows(whole: LazyTensor, start: int, end: int) -> Tensor:
    return whole.read()[start:end]


def _read_stacked(parts: Sequence[LazyTensor]) -> Tensor:
    return torch.cat([part.read() for part in parts])
