"""The checkpoint writer: a plain Hugging Face folder, or only the tensors that changed.

Tensors are computed as they are written, one in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from rotdistill_core.architecture.table import Config
from rotdistill_core.checkpoint.headers import SHARD_INDEX
from rotdistill_core.checkpoint.lazy import LazyTensor
from rotdistill_core.store.casts import SAVE_DTYPE, STUDENT_DTYPE
from rotdistill_core.store.files import Blocks, json_blocks, tensor_blocks
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.output import StepOutput

SHARD_BYTES = 4 << 30
"""Size that a shard does not exceed, unless one tensor alone does."""


def write_checkpoint(
    tensors: Mapping[str, LazyTensor],
    config: Config,
    write: Callable[[str, Blocks], object],
    dtype: torch.dtype,
) -> None:
    """Write a Hugging Face checkpoint through `write(file name, blocks)`.

    The order is: shards of weights, the index where there are several shards, config.json.

    Raises:
        CheckFailed: a number does not fit `dtype`.
    """
    shards = _shards(tensors, dtype)
    for name, shard in shards.items():
        sources = {n: (t.shape, dtype, t.read) for n, t in shard.items()}
        write(name, tensor_blocks(sources, SAVE_DTYPE))
    if len(shards) > 1:
        where = {tensor: name for name, shard in shards.items() for tensor in shard}
        total = sum(_bytes(tensor, dtype) for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write(SHARD_INDEX, json_blocks(index))
    saved_config = {key: value for key, value in config.items() if key != "torch_dtype"}
    saved_config["dtype"] = str(dtype).removeprefix("torch.")
    write(RunLayout.CONFIG, json_blocks(saved_config))


def _shards(
    tensors: Mapping[str, LazyTensor], dtype: torch.dtype
) -> dict[str, dict[str, LazyTensor]]:
    """Return the tensors by shard file, in order, each shard filled up to `SHARD_BYTES`."""
    shards: list[dict[str, LazyTensor]] = [{}]
    room = SHARD_BYTES
    for name, tensor in tensors.items():
        size = _bytes(tensor, dtype)
        if size > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = tensor
        room -= size
    count = len(shards)
    return {
        RunLayout.model_shard(number, count): shard for number, shard in enumerate(shards, start=1)
    }


def _bytes(tensor: LazyTensor, dtype: torch.dtype) -> int:
    return torch.Size(tensor.shape).numel() * dtype.itemsize


def commit_changes(
    tensors: Mapping[str, LazyTensor], out: StepOutput, dtype: torch.dtype
) -> dict[str, list[str]]:
    """Commit the tensors that no file holds yet.

    Returns:
        Tensor -> `[file, its name there]` for all tensors. Files are relative to the folder of
        runs; the empty name stands for the student's own files.

    Raises:
        CheckFailed: a number does not fit `dtype`.
    """
    changed = {n: (t.shape, dtype, t.read) for n, t in tensors.items() if t.stored is None}
    name = RunLayout.weights(out.step, RunLayout.CHANGED_TENSORS)
    path = out.find(name) or out.write(name, tensor_blocks(changed, STUDENT_DTYPE))
    where = {n: [relative_path(path, out.store.root), n] for n in changed}
    for n, tensor in tensors.items():
        if tensor.stored:
            file = relative_path(tensor.stored.file, out.store.root)
            where[n] = [file, tensor.stored.name]
    return where


def relative_path(path: Path, root: Path) -> str:
    """Return a path relative to the folder of runs; empty for a file elsewhere, the student's."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else ""
