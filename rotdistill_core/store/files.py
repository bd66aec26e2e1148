"""Atomic, durable writes, and the formats that runs are written in.

A file is written to a unique temporary name in its folder (see `rotdistill_core.store.place`) and
hashed on the way. Then follow fsync,
rename, and fsync of the folder; a new folder is synced into its parent first. A crash leaves the
old file or the new one, never a mixture. Only a line of the ledger commits a file; see
`rotdistill_core.store.ledger`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field

from rotdistill_core.errors import SetupError
from rotdistill_core.store.place import this_place

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "BOOL": "bool",
}
"""Code in a safetensors header -> name in torch."""
WIDTH = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "BOOL": 1}
"""Code in a safetensors header -> bytes of one number."""

Blocks = Iterable[bytes | memoryview]


def _inside_the_runs(path: str) -> str:
    """Return a path of a ledger if it can be one: relative, and not out of the folder of runs."""
    parts = path.removesuffix("/").split("/")
    if not all(parts) or {".", ".."} & {*parts} or "\0" in path:
        raise ValueError("is no path inside the folder of runs")
    if max(len(part.encode(errors="replace")) for part in parts) > LONGEST_NAME:
        raise ValueError(f"has a name of more than {LONGEST_NAME} bytes")
    return path


LONGEST_NAME = 255
"""Bytes of a file's name that file systems take."""
RunsPath = Annotated[str, Field(max_length=4000), AfterValidator(_inside_the_runs)]
"""A path relative to the folder of all runs, as ledgers state it."""


@dataclass(frozen=True)
class CommittedFile:
    """A committed file: path relative to the folder of all runs, length and sha256."""

    path: RunsPath
    bytes: int
    sha256: str


class TensorSource(NamedTuple):
    """A tensor to be written: its declared shape and dtype, and the function that computes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSource:
        """Return the source of a tensor at hand."""

        def read() -> Tensor:
            return tensor

        return cls(tuple(tensor.shape), tensor.dtype, read)


def write_file(path: Path, blocks: Blocks) -> tuple[int, str]:
    """Write a file atomically and durably; return its length and sha256.

    Raises:
        SetupError: the disk refuses (full, read-only). No file appears under the final name.
    """
    temporary = this_place().temporary(path, os.getpid())
    digest, size = hashlib.sha256(), 0
    try:
        make_folder(path.parent)
        try:
            with temporary.open("wb") as stream:
                for block in blocks:
                    digest.update(block)
                    size += stream.write(block)
                    del block  # free it before the next block is made
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            # The temporary file still exists only when something failed before the rename.
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    return size, digest.hexdigest()


def unwritable(path: Path, error: OSError) -> SetupError:
    """Return the error to raise when the disk refuses a file."""
    in_the_way = isinstance(error, IsADirectoryError | NotADirectoryError | FileExistsError)
    hint = " Move away what lies in its place." if in_the_way else ""
    return SetupError(
        f"{path}: cannot be written: {error.strerror}.{hint} What was committed before stays valid."
    )


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, durably.

    A power failure may lose the entry of a folder whose parent was not synced, and with it every
    file inside, synced or not.

    Raises:
        OSError: the disk refuses.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        sync_folder(each.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename or a new file in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def json_blocks(value: object, sort_keys: bool = True) -> list[bytes]:
    """Return a value as readable JSON."""
    return [(json.dumps(value, indent=1, ensure_ascii=False, sort_keys=sort_keys) + "\n").encode()]


def tensor_blocks(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype, Callable[[], Tensor]]],
    remedy: str = "",
) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file: the header, then each tensor as it is computed.

    The header needs only shapes and dtypes, so one tensor is in memory at a time.

    Args:
        tensors: name -> shape, dtype and the function that computes it; see `TensorSource`.
        remedy: what to do where a number does not fit its dtype; see `cast_that_fits`.

    Raises:
        CheckFailed: a number does not fit its dtype, or is NaN or Inf.
        ValueError: a computed tensor has another shape than declared.
    """
    # The ledger is read without torch.
    import torch  # noqa: PLC0415

    from rotdistill_core.store.casts import STORED_IN, cast_that_fits  # noqa: PLC0415

    codes = {getattr(torch, name): code for code, name in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype, _) in tensors.items():
        end = offset + WIDTH[codes[dtype]] * math.prod(shape)
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text

    for name, (shape, dtype, read) in tensors.items():
        tensor = cast_that_fits(read(), dtype, name, remedy or STORED_IN).contiguous()
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"tensor of shape {tuple(tensor.shape)} where {shape} was declared")
        if tensor.numel():
            yield tensor.reshape(-1).view(torch.uint8).numpy().data
        del tensor  # free it before the next tensor is computed
