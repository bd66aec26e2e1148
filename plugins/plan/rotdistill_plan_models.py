"""The sizes of a model, from its config and its table alone: from its folder, or from a config that is shipped beside the texts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rotdistill_core.adapter import Adapter
from rotdistill_core.errors import SetupError
from rotdistill_core.headers import folder_headers
from rotdistill_core.models import Model, open_model
from rotdistill_core.plugins import adapter_for
from rotdistill_core.recipe import ModelRef

WIDTH = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    adapter: Adapter
    config: Mapping[str, Any]
    stored: str
    """Dtype of its files."""
    keep: float = 1.0
    """Share of the parameters inside layers that a cut leaves."""

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.adapter.depth(self.config)

    @property
    def width(self) -> int:
        """Size of the residual stream."""
        return self.adapter.sizes(self.config)["residual"]

    @property
    def neurons(self) -> int:
        """Neurons of an MLP."""
        return self.adapter.sizes(self.config)["neurons.0"]

    @property
    def queries(self) -> int:
        """Coordinates of all query heads of a layer."""
        return self.adapter.sizes(self.config)["q.0"]

    @property
    def keys(self) -> int:
        """Coordinates of all keys of a layer; its values have as many."""
        return self.adapter.sizes(self.config)["kv.0"]

    @property
    def vocab(self) -> int:
        """Rows of embedding and head."""
        return self.adapter.sizes(self.config)["vocab"]

    def parameters(self, inside: bool | None = None) -> int:
        """Return the number of parameters: all, those inside layers, or those outside. A tied head counts once, absent biases not."""
        sizes, total = self.adapter.sizes(self.config), 0.0
        for name, param in self.adapter.expand(self.config).items():
            layer = name.startswith(f"{self.adapter.layers}.")
            if not param.optional and not (param.tied and self.config.get("tie_word_embeddings")) and inside in (None, layer):
                total += math.prod(sizes[axis] for axis in param.axes) * (self.keep if layer else 1)
        return round(total)

    @property
    def layer(self) -> float:
        """Parameters of one layer."""
        return self.parameters(inside=True) / self.depth

    @property
    def bytes(self) -> int:
        """Size of its files."""
        return self.parameters() * WIDTH[self.stored]

    def changed(self, keep: float = 1.0, **config: Any) -> Shape:
        """Return the shape behind a step that cuts, widens or unties."""
        return replace(self, config={**self.config, **config}, keep=self.keep * keep)


class NotHere(SetupError):
    """A model that is neither here nor described (exit code 3)."""


@dataclass(frozen=True)
class Known:
    """What is known of a model before it is opened."""

    shape: Shape
    folder: Path | None
    """Where it lies; None where only its config is known."""
    model: Model | None
    source: Path
    """Where the figures are from."""


def known(ref: ModelRef, texts: Path, say: Callable[[str], None]) -> Known:
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
    hub = name.count("/") == 1 and ":" not in name and not name.startswith((".", "/", "~")) and not name.endswith(".gguf")
    if not hub or Path(ref.model).is_dir():
        return _opened(open_model(ref, say))
    if folder := _cached(ref):
        return _opened(open_model(ref.model_copy(update={"model": str(folder)}), say))
    path = Path(os.path.normpath(texts / "configs" / f"{ref.model}.json"))
    if not path.is_file():
        raise NotHere(f"{ref.model}: there is no such folder here, nor such a model in the hub's cache, nor {path} to say how large it is. "
                      "If it is a hub id, `rotdistill run` downloads it.")  # fmt: skip
    config = json.loads(path.read_text(encoding="utf-8"))
    adapter = adapter_for(config["model_type"])
    config = adapter.completed(config)
    return Known(Shape(adapter, config, str(config.get("dtype") or config["torch_dtype"])), None, None, path)


def _cached(ref: ModelRef) -> Path | None:
    """Return the folder of a hub model in the local cache, where it is whole."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(ref.model, "config.json", revision=ref.revision)
    folder = Path(found).parent if isinstance(found, str) else None
    return folder if folder and any(folder.glob("*.safetensors")) else None


def _opened(model: Model) -> Known:
    stored = folder_headers(model.folder)[model.adapter.embedding].dtype
    return Known(Shape(model.adapter, model.config, stored), model.folder, model, model.folder)
