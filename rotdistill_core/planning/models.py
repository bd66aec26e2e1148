"""The shape of a model before it is opened, without asking the network.

The figures come from the model's folder. A Hugging Face model that is not in the local cache is
read from a config that is shipped with the texts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rotdistill_core.architecture.counts import require_counts
from rotdistill_core.checkpoint.headers import TOKENIZERS, folder_headers, missing_files
from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.open import has_source, open_model
from rotdistill_core.errors import ModelNotAvailable, SetupError
from rotdistill_core.planning.shape import ModelShape
from rotdistill_core.plugin.registry import adapter_for
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.plain import read_text


@dataclass(frozen=True)
class ModelInfo:
    """The shape of a model, and where it was read."""

    shape: ModelShape
    folder: Path | None
    """Folder of its files; None if only its config is known."""
    model: Model | None
    """The opened model; None if only its config is known."""
    source: Path
    """Folder or file that the figures come from."""


def model_info(ref: ModelRef, texts: Path, log: Callable[[str], None]) -> ModelInfo:
    """Return the shape of a model, without asking the network.

    Args:
        ref: the recipe's reference.
        texts: the folder of the texts. A Hugging Face id that is not in the local cache is looked
            up there, in `configs/owner/name.json`.
        log: receives one line for the user.

    Raises:
        ModelNotAvailable: there are neither files nor a config.
        RotdistillError: see `open_model`.
    """
    if not _is_hub_id(ref.model) or Path(ref.model).is_dir():
        return _opened(open_model(ref, log))
    cached = _cached_folder(ref)
    missing = missing_files(cached) if cached else []
    if cached and not {*missing} - {TOKENIZERS[0]}:
        return _opened(open_model(ref.model_copy(update={"model": str(cached)}), log))
    path = Path(os.path.normpath(texts / "configs" / f"{ref.model}.json"))
    if not path.is_file():
        in_cache = (
            f"only a part of such a model in the hub's cache ({', '.join(missing)} missing in "
            f"{cached})"
            if cached
            else "nor such a model in the hub's cache"
        )
        raise ModelNotAvailable(
            ref.model,
            f"there is no such folder here, {in_cache}, nor {path} to say how large it is. If it "
            "is a hub id, `rotdistill run` downloads it.",
        )
    return _described(path)


def needs_source(ref: ModelRef) -> bool:
    """Return whether a source has to open a reference: it is no folder and no id of a hub."""
    return not Path(ref.model).expanduser().is_dir() and has_source(ref.model)


def _is_hub_id(name: str) -> bool:
    """Return whether a reference has the form `owner/name` of a Hugging Face id."""
    is_path = name.startswith((".", "/", "~")) or name.endswith(".gguf")
    return name.count("/") == 1 and ":" not in name and not is_path


def _cached_folder(ref: ModelRef) -> Path | None:
    """Return the folder of a Hugging Face model in the local cache, whole or not.

    Raises:
        SetupError: the name is none that a model on Hugging Face can have.
    """
    # Loading it takes longer than the rest of a plan for local models.
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415

    try:
        config = try_to_load_from_cache(ref.model, RunLayout.CONFIG, revision=ref.revision)
    except HFValidationError as error:
        raise SetupError(
            f"{ref.model}: is no folder here, and no id of Hugging Face: {error} A revision has "
            "a key of its own, `revision`."
        ) from error
    return Path(config).parent if isinstance(config, str) else None


def _opened(model: Model) -> ModelInfo:
    headers = folder_headers(model.folder, model.adapter.body)
    stored = headers[model.adapter.embedding].dtype
    shape = ModelShape(model.adapter, model.config, stored)
    return ModelInfo(shape=shape, folder=model.folder, model=model, source=model.folder)


def _described(path: Path) -> ModelInfo:
    """Return what a shipped config states."""
    config = json.loads(read_text(path))
    adapter = adapter_for(config["model_type"])
    require_counts(adapter, config, str(path))
    config = adapter.completed(config)
    stored = str(config.get("dtype") or config["torch_dtype"])
    shape = ModelShape(adapter, config, stored)
    return ModelInfo(shape=shape, folder=None, model=None, source=path)
