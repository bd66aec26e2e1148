"""The sizes of a model, from its config and its table alone: from its folder, or from a config that is shipped beside the texts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rotdistill_core.checkpoint.headers import folder_headers
from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.errors import SetupError
from rotdistill_core.planning.shape import ModelShape
from rotdistill_core.plugin.registry import adapter_for
from rotdistill_core.recipe.document import ModelRef


class ModelNotAvailable(SetupError):
    """A model that is neither here nor described (exit code 3)."""


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model before it is opened."""

    shape: ModelShape
    folder: Path | None
    """Where it lies; None where only its config is known."""
    model: Model | None
    source: Path
    """Where the figures are from."""


def model_info(ref: ModelRef, texts: Path, log: Callable[[str], None]) -> ModelInfo:
    """Return what is known of a model, without asking the network.

    Args:
        ref: the recipe's.
        texts: the folder of the texts; a hub id that is not in the cache is looked up there, in `configs/owner/name.json`.
        say: tells the user one line.

    Raises:
        NotHere: it is neither here nor described.
        RotdistillError: see `open_model`.
    """
    name = ref.model
    hub = (
        name.count("/") == 1
        and ":" not in name
        and not name.startswith((".", "/", "~"))
        and not name.endswith(".gguf")
    )
    if not hub or Path(ref.model).is_dir():
        return _info_of(open_model(ref, log))
    if folder := _cached(ref):
        return _info_of(open_model(ref.model_copy(update={"model": str(folder)}), log))
    path = Path(os.path.normpath(texts / "configs" / f"{ref.model}.json"))
    if not path.is_file():
        raise ModelNotAvailable(f"{ref.model}: there is no such folder here, nor such a model in the hub's cache, nor {path} to say how large it is. "
                      "If it is a hub id, `rotdistill run` downloads it.")  # fmt: skip
    config = json.loads(path.read_text(encoding="utf-8"))
    adapter = adapter_for(config["model_type"])
    config = adapter.completed(config)
    return ModelInfo(
        ModelShape(adapter, config, str(config.get("dtype") or config["torch_dtype"])),
        None,
        None,
        path,
    )


def _cached(ref: ModelRef) -> Path | None:
    """Return the folder of a hub model in the local cache, where it is whole."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(ref.model, "config.json", revision=ref.revision)
    folder = Path(found).parent if isinstance(found, str) else None
    return folder if folder and any(folder.glob("*.safetensors")) else None


def _info_of(model: Model) -> ModelInfo:
    stored = folder_headers(model.folder)[model.adapter.embedding].dtype
    return ModelInfo(
        ModelShape(model.adapter, model.config, stored), model.folder, model, model.folder
    )
