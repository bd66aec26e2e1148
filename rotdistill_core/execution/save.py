"""Checkpoints of variants: plain Hugging Face folders in the run's folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from rotdistill_core.checkpoint.models import tokenizer_contents
from rotdistill_core.checkpoint.weights import Weights, open_folder
from rotdistill_core.execution.context import RunContext
from rotdistill_core.execution.keys import checkpoint_key
from rotdistill_core.execution.outcome import VariantState
from rotdistill_core.recipe.as_toml import resolved_toml
from rotdistill_core.store.files import Blocks
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.plain import read_text
from rotdistill_core.store.records import CheckpointRecord


def save_variant(run: RunContext, variant: str, state: VariantState, dtype: torch.dtype) -> Path:
    """Write a variant as a Hugging Face folder, unless the run holds it and it hashes true.

    A run's checkpoints lie in its own folder, even if another run made the same weights. When the
    recipe's inputs have changed since an older checkpoint was written, the new one lies next to it.

    Raises:
        SetupError: the disk refuses.
        CheckFailed: a weight does not fit the dtype.
    """
    key = checkpoint_key(variant, state.key, dtype_name(dtype))
    record = run.store.find_checkpoint(key, run.ledger)
    if record is None or record.variant != variant:
        record = _write(run, variant, state, dtype, key)
    newest = [each for each in run.ledger.checkpoints if each.variant == variant][-1]
    if newest != record:  # the inputs are again what they were before: readers take the last line
        run.ledger.append(record)
    return run.store.root / record.folder


def open_saved(folder: Path, state: VariantState) -> Weights:
    """Open a saved variant. What happened to its stream is not in the folder: the state knows."""
    config = json.loads(read_text(folder / RunLayout.CONFIG))
    saved = open_folder(folder, config, state.weights.adapter)
    return replace(saved, lineage=state.weights.lineage)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as recipes write it, such as `float32`."""
    return str(dtype).removeprefix("torch.")


def _write(
    run: RunContext, variant: str, state: VariantState, dtype: torch.dtype, key: str
) -> CheckpointRecord:
    out = run.output(key)

    hashes: dict[str, str] = {}

    def write(name: str, blocks: Blocks) -> Path:
        path = out.write(RunLayout.checkpoint(variant, name), blocks)
        hashes[name] = out.used[path.relative_to(run.store.root).as_posix()].sha256
        return path

    for name, content in tokenizer_contents(run.tokenizer_folder).items():
        write(name, [content])
    state.weights.save(write, dtype)
    write(RunLayout.RECIPE, [resolved_toml(run.loaded).encode()])

    # The manifest comes last: a folder with a manifest is complete.
    manifest = out.json(RunLayout.checkpoint(variant, RunLayout.MANIFEST), hashes)
    record = CheckpointRecord(
        key=key,
        variant=variant,
        folder=manifest.parent.relative_to(run.store.root).as_posix(),
        files=tuple(out.used.values()),
    )
    run.ledger.append(record)
    return record
