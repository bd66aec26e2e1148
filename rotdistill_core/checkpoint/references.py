"""Checkpoints and adapters that the options of a step name beside the models of a recipe."""

from __future__ import annotations

from pathlib import Path

from rotdistill_core.checkpoint.adapter_config import ADAPTER_CONFIG
from rotdistill_core.checkpoint.open import locate_model, open_model
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.hashing import sha256_of
from rotdistill_core.store.layout import RunLayout


def reference_of(name: str) -> ModelRef:
    """Return the reference of a folder, a hub id with or without `@revision`, or another kind."""
    model, _, revision = name.partition("@")
    if not revision or Path(name).expanduser().is_dir():
        return ModelRef(model=name)
    return ModelRef(model=model, revision=revision)


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds a LoRA and no model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / RunLayout.CONFIG).is_file()


def content_digest(name: str) -> str:
    """Return the sha256 of what a name stands for now, so that a step notices a change.

    Raises:
        SetupError, PluginError: there is no such model or adapter.
    """
    folder = locate_model(reference_of(name))
    if is_adapter(folder):
        return " ".join(sha256_of(path) for path in sorted(folder.glob("adapter_*")))
    return open_model(reference_of(name)).sha256
