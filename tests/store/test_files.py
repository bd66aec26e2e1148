"""Atomic writes: a crash or a full disk leaves the old file or the new one."""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from weakref import ReferenceType, ref

import pytest
import torch
from safetensors.torch import load_file

from rotdistill_core.errors import SetupError
from rotdistill_core.store.files import TensorSource, tensor_blocks, write_file
from rotdistill_core.store.hashing import sha256_of


def raise_disk_full(handle: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_write_file_returns_length_and_hash(tmp_path: Path) -> None:
    size, digest = write_file(tmp_path / "new" / "a", [b"ab", memoryview(b"cd")])
    assert (size, digest) == (4, sha256_of(tmp_path / "new" / "a"))


def test_write_file_leaves_the_old_file_when_the_blocks_raise(tmp_path: Path) -> None:
    def blocks() -> Iterator[bytes]:
        yield b"half"
        raise KeyboardInterrupt

    write_file(tmp_path / "a", [b"old"])
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "a", blocks())
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_full_disk_is_a_setup_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", raise_disk_full)
    with pytest.raises(SetupError, match=r"a\.bin: cannot be written: No space left on device"):
        write_file(tmp_path / "a.bin", [b"x"])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_setup_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SetupError, match="cannot be written"):
        write_file(tmp_path / "file" / "a.bin", [b"x"])


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64]
)
def test_safetensors_reads_tensor_files_back_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": torch.arange(15).reshape(3, 5).to(dtype),
        "transposed": torch.arange(6).reshape(2, 3).to(dtype).T,
        "scalar": torch.tensor(3).to(dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
    }
    sources = {name: TensorSource.of(tensor) for name, tensor in tensors.items()}
    write_file(tmp_path / "t.safetensors", tensor_blocks(sources))
    found = load_file(tmp_path / "t.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)


def test_a_tensor_of_another_shape_than_declared_is_refused(tmp_path: Path) -> None:
    source = TensorSource((2, 2), torch.float32, lambda: torch.zeros(3))
    with pytest.raises(ValueError, match="was declared"):
        write_file(tmp_path / "a.safetensors", tensor_blocks({"a": source}))
    assert list(tmp_path.iterdir()) == []


def test_a_block_is_freed_before_the_next_one_is_made(tmp_path: Path) -> None:
    blocks: list[ReferenceType[array[int]]] = []

    def make() -> Iterator[bytes]:
        for k in range(3):
            assert not any(block() for block in blocks)
            block = array("B", [k] * 9)
            blocks.append(ref(block))
            yield block  # type: ignore[misc]
            del block

    assert write_file(tmp_path / "file", make())[0] == 27
