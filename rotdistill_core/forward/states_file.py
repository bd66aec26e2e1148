"""States of all texts that lie in a file, so that they take no memory however many texts there are.

The file is mapped, and its pages are the operating system's: it writes them back and evicts them
where memory is short. The file has no name once it is mapped, so it is gone when the last tensor
that shows it is, whatever ends the process.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from rotdistill_core.errors import SetupError
from rotdistill_core.store.files import make_folder, unwritable
from rotdistill_core.store.place import this_place

NAME = "states"
"""What the name of the file begins with, while it has one."""
CHUNK_BYTES = 2**20
"""Zeros that are written at a time."""


def tensor_in_file(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor of zeros in a file of its own in `folder`, which is gone with the tensor.

    The whole file is written first. A full disk is an error here, and not when a page is written
    back, which would end the process.

    Raises:
        SetupError: the disk refuses (full, read-only), or its file system maps no files.
    """
    count = math.prod(shape)
    if not count:
        return torch.zeros(shape, dtype=dtype)
    path = this_place().temporary(folder / NAME, os.getpid())
    try:
        try:
            make_folder(folder)
            _write_zeros(path, count * dtype.itemsize)
            return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(shape)
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
    except RuntimeError as error:
        raise SetupError(
            f"{path}: cannot be mapped into memory: {str(error).splitlines()[0]}. Carry out "
            "the recipe where its folder of runs lies on a local disk."
        ) from error


def _write_zeros(path: Path, size: int) -> None:
    """Write a file of so many zeros.

    Raises:
        OSError: the disk refuses.
    """
    zeros = memoryview(bytes(CHUNK_BYTES))
    with path.open("xb") as stream:
        for begin in range(0, size, CHUNK_BYTES):
            stream.write(zeros[: size - begin])
