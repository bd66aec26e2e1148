"""The one place that writes files, and the ledger that says which of them count.

Commit protocol: write to a unique temporary name in the same folder while hashing, fsync, rename, fsync the folder, then append
one fsynced ledger line with length and sha256. Only that line commits. Reading verifies the hash on first use; existence,
modification times and locks prove nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotdistill_core.errors import SetupError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 1 << 22
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "BOOL": "bool",
}
WIDTH = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "BOOL": 1}

Blocks = Iterable[bytes | memoryview]


@dataclass(frozen=True)
class CommittedFile:
    """A committed file: path relative to the folder of all runs, length and sha256."""

    path: str
    bytes: int
    sha256: str


def write_file(path: Path, blocks: Blocks) -> tuple[int, str]:
    """Write a file atomically and durably; return its length and sha256.

    Raises:
        SetupError: the disk refuses (full, read-only); nothing is left behind under the final name.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    digest, size = hashlib.sha256(), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as stream:
                for block in blocks:
                    digest.update(block)
                    size += stream.write(block)
                    del block  # before the next one is made
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)  # there only when something failed before the rename
        sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    return size, digest.hexdigest()


def unwritable(path: Path, error: OSError) -> SetupError:
    return SetupError(
        f"{path}: cannot be written: {error.strerror}. What was committed before stays valid."
    )


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def json_blocks(value: object) -> Blocks:
    """Return a value as readable JSON."""
    return [(json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()]


def tensor_blocks(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype, Callable[[], Tensor]]],
) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file: header from shapes and dtypes, then each tensor as it is computed, one in memory at a time."""
    import torch

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
    for shape, dtype, read in tensors.values():
        tensor = read().to("cpu", dtype).contiguous()
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"tensor of shape {tuple(tensor.shape)} where {shape} was declared")
        if tensor.numel():
            yield tensor.reshape(-1).view(torch.uint8).numpy().data
        del tensor  # before the next one is made
