"""Sizes of a model, from its config and its table alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rotdistill_core.architecture.table import Adapter

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number."""


@dataclass(frozen=True)
class ModelShape:
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
    def query_width(self) -> int:
        """Coordinates of all query heads of a layer."""
        return self.adapter.sizes(self.config)["q.0"]

    @property
    def kv_width(self) -> int:
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
            if (
                not param.optional
                and not (param.tied and self.config.get("tie_word_embeddings"))
                and inside in (None, layer)
            ):
                total += math.prod(sizes[axis] for axis in param.axes) * (self.keep if layer else 1)
        return round(total)

    @property
    def layer_parameters(self) -> float:
        """Parameters of one layer."""
        return self.parameters(inside=True) / self.depth

    @property
    def bytes(self) -> int:
        """Size of its files."""
        return self.parameters() * DTYPE_BYTES[self.stored]

    def changed(self, keep: float = 1.0, **config: Any) -> ModelShape:
        """Return the shape behind a step that cuts, widens or unties."""
        return replace(self, config={**self.config, **config}, keep=self.keep * keep)
